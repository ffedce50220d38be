"""What constrained decoding costs: time of a batch's answers with it and without, and what it is made of.

    python benchmarks/constrained.py                     the demo base on every unit of the demo's dev set
    python benchmarks/constrained.py --quick             a look: four samples, two rounds
    python benchmarks/constrained.py --check             exit code 1 where an answer is not the one that was wanted

The base is made to say the gold answers, so that both ways generate the same tokens in the same steps. What is
constrained includes building the constraint, once a batch. Its own time depends on the texts and the labels, not on
the model; it is measured alone too, under scores as wide as FLAN-T5's or LLaMA's. Rounds are interleaved, ratios are
medians within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, interleaved, ratio, results_file

from lvlm_clorae.data.batches import Batcher, Instance
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.shards import load_index
from lvlm_clorae.data.units import Unit, find_units
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.models import load_model
from lvlm_clorae.models.constrained import Constraint
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.models.processor import Processor
from lvlm_clorae.tasks import format_answer

VOCABULARY = 32128
HEADINGS = ("unit", "labels", "steps", "free", "constrained", "ratio", "built in", "a step")


class Wanted(LogitsProcessor):
    """Makes the answers those of the token ids ``[B, T]``."""

    def __init__(self, tokens: Tensor) -> None:
        self.columns = iter(tokens.unsqueeze(-1).unbind(1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, next(self.columns), torch.inf)


class Case:
    """A batch of one unit and the answers that are wanted, said in every way that is compared."""

    def __init__(self, model: Any, batcher: Batcher, unit: Unit, samples: int, device: torch.device) -> None:
        self.model, self.processor = model, batcher.processor
        batch = batcher([Instance(unit, Place(0, number)) for number in range(samples)], answers=False)
        self.tensors = {name: tensor.to(device) for name, tensor in batch.tensors.items()}
        self.asked = [(sample, unit.subtask, unit.labels) for sample in batch.samples]
        self.gold = [format_answer(sample, unit.subtask) for sample in batch.samples]
        self.tokens = endings(self.processor, self.gold).to(device)
        self.scores = torch.randn(samples, VOCABULARY, device=device)
        self.wrong: set[str] = set()

    def ways(self) -> dict[str, Callable[[], object]]:
        return {"free": self.free, "constrained": self.constrained, "build": self.build, "alone": self.alone}

    def free(self) -> None:
        self._say(None)

    def constrained(self) -> None:
        self._say(self.build())

    def build(self) -> Constraint:
        return Constraint(self.processor, self.asked)

    def alone(self) -> None:
        """The constraint built and asked at every step."""
        constraint = self.build()
        for number in range(self.tokens.shape[1]):
            constraint(self.tokens[:, :number], self.scores)

    def _say(self, constraint: Constraint | None) -> None:
        wanted = [Wanted(self.tokens)]
        said = generate_answers(
            self.model, self.processor, self.tensors, self.tokens.shape[1], constraint, logits_processor=wanted
        )
        self.wrong |= set(said) - set(self.gold)


def endings(processor: Processor, answers: list[str]) -> Tensor:
    """The answers' token ids ``[B, T]``, each with its end, which is repeated to the right."""
    end = int(processor.tokenizer.eos_token_id)
    rows = processor.answer_ids(answers)
    width = max(map(len, rows)) + 1
    return torch.tensor([row + [end] * (width - len(row)) for row in rows])


def measure(case: Case, unit: Unit, options: argparse.Namespace) -> dict[str, Any]:
    """One row of results."""
    seconds = interleaved(case.ways(), options.repeats, options.device, options.seconds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    steps, samples = case.tokens.shape[1], len(case.gold)
    labels = (
        unit.labels if isinstance(unit.labels, list) else [name for names in unit.labels.values() for name in names]
    )
    return {
        "unit": unit.name,
        "samples": samples,
        "labels": len(labels),
        "steps": steps,
        "rounds": len(seconds["free"]),
        "seconds": {name: medians[name] for name in ("free", "constrained")},
        "answers_per_second": {name: samples / medians[name] for name in ("free", "constrained")},
        "time_by_free": ratio(seconds, "constrained", "free"),
        "build_seconds": medians["build"],
        "step_seconds": (medians["alone"] - medians["build"]) / steps,
        "wrong_answers": sorted(case.wrong),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    for row in rows:
        cells = [row["unit"], str(row["labels"]), str(row["steps"])]
        cells += [f"{row['answers_per_second'][name]:.0f} answers/s" for name in ("free", "constrained")]
        cells += [f"{row['time_by_free']:.2f}"]
        cells += [f"{1e3 * row['build_seconds']:.1f} ms", f"{1e3 * row['step_seconds']:.2f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    wrong = sum(len(row["wrong_answers"]) for row in rows)
    return "\n".join([*lines, f"answers that are not the wanted ones: {wrong}"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as train.py takes it; weights as they are, without an adapter")
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--split", default="dev", choices=("train", "dev", "test"))
    parser.add_argument("--batch", type=int, default=16, help="samples that are generated for at once")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds a unit, at least")
    parser.add_argument("--seconds", type=float, default=8.0, help="time a unit, at least")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--note", help="about the machine's state, for the results file")
    parser.add_argument("--quick", action="store_true", help="four samples, two rounds")
    parser.add_argument("--check", action="store_true", help="exit with 1 where an answer is not the wanted one")
    parser.add_argument("--output", type=Path, help="JSON file; default results/constrained-<device>-<date>.json")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.batch, options.repeats, options.seconds = 4, 2, 0.0
    settings = {name: getattr(options, name) for name in ("model", "split", "batch", "repeats", "seconds", "note")}
    options.about = {**description(options.device), **settings, "shards": str(options.shards), "vocabulary": VOCABULARY}
    kind = "quick-" if options.quick else ""
    name = f"constrained-{kind}{options.device.type}-{options.about['date']}.json"
    options.output = results_file(parser, options.output, name)
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code: 1 where ``--check`` is given and an answer is another, else 0."""
    options = parse(argv)
    try:
        index = load_index(options.shards)
        model, processor = load_model(options.model)
        batcher = Batcher(ShardReader(index, options.shards), processor, options.split)
        model.to(options.device).eval()
        rows = []
        for unit in find_units(index, options.split).values():
            samples = min(options.batch, batcher.reader.shards(unit.dataset, options.split)[0].samples)
            rows.append(measure(Case(model, batcher, unit, samples, options.device), unit, options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_text_atomic(options.output, json.dumps({"about": options.about, "rows": rows}, indent=1) + "\n")
    print(table(rows), f"written to {options.output}", sep="\n")
    return 1 if options.check and any(row["wrong_answers"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
