"""What evaluation costs beside the generation in it: samples a second by a plain `generate` loop's on the same batches.

    python benchmarks/evaluation.py --run runs/demo-clorae
    python benchmarks/evaluation.py --run runs/demo-clorae --check     exit code 1 where it is below 0.9

The plain loop has its tensors in memory before the clock starts, and only generates: no reading of shards, prompts,
tokens, pictures, decoding, parsing, scoring. Rounds are interleaved; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, interleaved, ratio, results_file

from lvlm_clorae.adapter_directory import adapter_directory
from lvlm_clorae.data.batches import Batcher
from lvlm_clorae.data.places import open_shards
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.units import find_units
from lvlm_clorae.errors import UserError
from lvlm_clorae.extractor import Extractor
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.models.generation import choose_tasks
from lvlm_clorae.training import distributed
from lvlm_clorae.training.evaluation import Evaluation

BAR = 0.9


class PlainLoop:
    """`generate` over batches that are ready, and nothing else."""

    def __init__(self, evaluation: Evaluation, model: Any) -> None:
        self.evaluation, self.model = evaluation, model
        self.batches = list(evaluation.batches())

    @torch.no_grad()
    def __call__(self) -> None:
        for batch in self.batches:
            choose_tasks(self.model, [unit.task for unit in batch.units], self.evaluation.tasks)
            self.model.generate(**batch.tensors, max_new_tokens=self.evaluation.max_new_tokens, do_sample=False)


def measure(run: Path, shards: str, split: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """Seconds of a pass by each way. Raises UserError for a run or shards that cannot be read."""
    extractor = Extractor.from_pretrained(adapter_directory(run), device=distributed.device())
    index, sources = open_shards(shards)
    limits = extractor.schema["max_length"], extractor.schema["max_answer_length"]
    units = list(find_units(index, split).values())
    batcher = Batcher(ShardReader(index, sources), extractor.processor, split, *limits)
    evaluation = Evaluation(batcher, units, batch_size, limits[1], extractor.schema["tasks"])
    plain = PlainLoop(evaluation, extractor.model)
    steps = {"evaluation": lambda: evaluation(extractor.model), "plain generate": plain}
    seconds = interleaved(steps, repeats, distributed.device())
    return {
        "samples": len(evaluation),
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "throughput_by_plain": 1 / ratio(seconds, "evaluation", "plain generate"),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run on the demo, or an adapter directory")
    parser.add_argument("--shards", default="shards/demo")
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 below {BAR}")
    parser.add_argument("--output", type=Path, help="JSON file; default results/evaluation-<date>.json")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.about = {**description(torch.device("cpu")), "split": options.split, "batch": options.batch}
    options.output = results_file(parser, options.output, f"evaluation-{options.about['date']}.json")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write. Returns 1 where ``--check`` is given and the bar is not met, 2 for a user's error."""
    options = parse(argv)
    distributed.start()
    try:
        found = measure(options.run, options.shards, options.split, options.batch, options.repeats)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        distributed.stop()
    write_text_atomic(options.output, json.dumps({"about": options.about, **found}, indent=1) + "\n")
    for name, seconds in found["seconds"].items():
        print(f"{name}: {found['samples'] / seconds:.1f} samples/s")
    share = found["throughput_by_plain"]
    print(f"evaluation by plain generate: {share:.3f}, to be >= {BAR}: {'met' if share >= BAR else 'not met'}")
    print(f"written to {options.output}")
    return 1 if options.check and share < BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
