"""Throughput of evaluation relative to a plain ``generate`` loop on the same batches.

    python benchmarks/evaluation.py --run runs/demo-clorae
    python benchmarks/evaluation.py --run runs/demo-clorae --check     exit code 1 below 0.9

The plain loop only generates, with its tensors in memory before the clock starts: no reading of shards, prompts,
tokenization, images, decoding, parsing or scoring. Rounds are interleaved; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, interleaved, ratio, results_file

from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.loader import ShardDataLoader
from lvlm_clorae.data.storage import open_storages
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.inference.adapter_directory import adapter_directory
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.training import distributed
from lvlm_clorae.training.evaluation import Evaluator

BAR = 0.9


class PlainLoop:
    """Call ``generate`` on prepared batches."""

    def __init__(self, evaluation: Evaluator, model: Any) -> None:
        self.evaluation, self.model = evaluation, model
        collator = replace(evaluation.collator, with_labels=False)
        self.batches = list(ShardDataLoader(evaluation.dataset, evaluation.batches, collator))

    @torch.no_grad()
    def __call__(self) -> None:
        for batch in self.batches:
            if hasattr(self.model, "set_task"):
                self.model.set_task(batch.dataset_task.task)
            self.model.generate(**batch.tensors, max_new_tokens=self.evaluation.max_new_tokens, do_sample=False)


def measure(run: Path, shards: str, split: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """Measure the seconds of a pass by each variant. Raises UserError for an unreadable run or shards."""
    extractor = Extractor.from_pretrained(adapter_directory(run), device=distributed.device())
    index, storages = open_storages(shards)
    limits = extractor.schema["max_source_length"], extractor.schema["max_target_length"]
    collator = Collator(extractor.processor, index.dataset_tasks(split), *limits)
    dataset = ShardDataset(index, storages, split)
    evaluation = Evaluator(dataset, collator, batch_size, limits[1])
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
    parser.add_argument("--threads", type=int, help="number of torch threads")
    parser.add_argument("--check", action="store_true", help=f"exit with code 1 below {BAR}")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/evaluation-<date>.json)")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.about = {**description(torch.device("cpu")), "split": options.split, "batch": options.batch}
    options.output = results_file(parser, options.output, f"evaluation-{options.about['date']}.json")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write results. Returns 1 if ``--check`` fails, 2 for a user error, else 0."""
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
    print(f"evaluation / plain generate: {share:.3f}, bar >= {BAR}: {'met' if share >= BAR else 'not met'}")
    print(f"written to {options.output}")
    return 1 if options.check and share < BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
