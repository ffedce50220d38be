"""Cost of constrained decoding: time to generate a batch's answers with and without it, and its parts.

    python benchmarks/constrained.py                     the demo base on every dataset task of the demo's dev set
    python benchmarks/constrained.py --quick             four samples, two rounds
    python benchmarks/constrained.py --check             exit code 1 if an answer differs from the gold answer

Generation is forced to the gold answers, so that both variants generate the same tokens in the same steps. The
constrained variant includes building the constraint, once per batch. The constraint's own time depends on texts and
labels, not on the model; it is also measured alone, with a vocabulary as wide as FLAN-T5's or LLaMA's. Rounds are
interleaved, and ratios are medians over rounds.
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

from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetTask, load_index
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.models import load_model
from lvlm_clorae.models.constrained import Constraint
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.models.processor import Processor
from lvlm_clorae.tasks import format_answer

VOCABULARY = 32128
HEADINGS = ("dataset_task", "labels", "steps", "free", "constrained", "ratio", "build", "per step")


class Forced(LogitsProcessor):
    """Forces generation to the token ids ``[B, T]``."""

    def __init__(self, tokens: Tensor) -> None:
        self.columns = iter(tokens.unsqueeze(-1).unbind(1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, next(self.columns), torch.inf)


class Case:
    """A batch of one dataset task with its gold answers, and the variants that are compared."""

    def __init__(
        self,
        model: Any,
        dataset: ShardDataset,
        collator: Collator,
        dataset_task: DatasetTask,
        options: argparse.Namespace,
    ) -> None:
        self.model, self.processor, device = model, collator.processor, options.device
        batch = collator(dataset.__getitems__(dataset.refs(dataset_task.name)[: options.batch]))
        samples = len(batch.keys)
        self.tensors = {name: tensor.to(device) for name, tensor in batch.tensors.items()}
        self.questions = [(sample, dataset_task.subtask, dataset_task.labels) for sample in batch.samples]
        self.gold = [format_answer(sample, dataset_task.subtask) for sample in batch.samples]
        self.tokens = padded_answers(self.processor, self.gold).to(device)
        self.scores = torch.randn(samples, VOCABULARY, device=device)
        self.wrong: set[str] = set()

    def variants(self) -> dict[str, Callable[[], object]]:
        return {"free": self.free, "constrained": self.constrained, "build": self.build, "alone": self.alone}

    def free(self) -> None:
        self._generate(None)

    def constrained(self) -> None:
        self._generate(self.build())

    def build(self) -> Constraint:
        return Constraint(self.processor, self.questions)

    def alone(self) -> None:
        """Build the constraint and apply it at every step."""
        constraint = self.build()
        for number in range(self.tokens.shape[1]):
            constraint(self.tokens[:, :number], self.scores)

    def _generate(self, constraint: Constraint | None) -> None:
        forced = [Forced(self.tokens)]
        answers = generate_answers(
            self.model,
            self.processor,
            self.tensors,
            self.tokens.shape[1],
            constraint=constraint,
            logits_processor=forced,
        )
        self.wrong |= set(answers) - set(self.gold)


def padded_answers(processor: Processor, answers: list[str]) -> Tensor:
    """Return the answers' token ids ``[B, T]``, padded on the right with the end-of-sequence token."""
    end = int(processor.tokenizer.eos_token_id)
    rows = processor.answer_ids(answers)
    width = max(map(len, rows)) + 1
    return torch.tensor([row + [end] * (width - len(row)) for row in rows])


def measure(case: Case, dataset_task: DatasetTask, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row of results."""
    seconds = interleaved(case.variants(), options.repeats, options.device, options.seconds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    steps, samples = case.tokens.shape[1], len(case.gold)
    labels = (
        dataset_task.labels
        if isinstance(dataset_task.labels, list)
        else [name for names in dataset_task.labels.values() for name in names]
    )
    return {
        "dataset_task": dataset_task.name,
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
        cells = [row["dataset_task"], str(row["labels"]), str(row["steps"])]
        cells += [f"{row['answers_per_second'][name]:.0f} answers/s" for name in ("free", "constrained")]
        cells += [f"{row['time_by_free']:.2f}"]
        cells += [f"{1e3 * row['build_seconds']:.1f} ms", f"{1e3 * row['step_seconds']:.2f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    wrong = sum(len(row["wrong_answers"]) for row in rows)
    return "\n".join([*lines, f"answers that differ from gold: {wrong}"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="model name as in train.py; used without an adapter")
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--split", default="dev", choices=("train", "dev", "test"))
    parser.add_argument("--batch", type=int, default=16, help="samples per batch")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="minimum rounds per dataset task")
    parser.add_argument("--seconds", type=float, default=8.0, help="minimum time per dataset task [s]")
    parser.add_argument("--threads", type=int, help="number of torch threads")
    parser.add_argument("--note", help="note on the machine for the results file")
    parser.add_argument("--quick", action="store_true", help="four samples, two rounds")
    parser.add_argument("--check", action="store_true", help="exit with code 1 if an answer differs from gold")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/constrained-<device>-<date>.json)")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.batch, options.repeats, options.seconds = 4, 2, 0.0
    settings = {name: getattr(options, name) for name in ("model", "split", "batch", "repeats", "seconds", "note")}
    options.about = {**description(options.device), **settings, "shards": str(options.shards), "vocabulary": VOCABULARY}
    prefix = "quick-" if options.quick else ""
    name = f"constrained-{prefix}{options.device.type}-{options.about['date']}.json"
    options.output = results_file(parser, options.output, name)
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write results. Returns 1 if ``--check`` finds a wrong answer, 2 for a user error, else 0."""
    options = parse(argv)
    try:
        index = load_index(options.shards)
        model, processor = load_model(options.model)
        dataset = ShardDataset(index, options.shards, options.split)
        dataset_tasks = index.dataset_tasks(options.split)
        collator = Collator(processor, dataset_tasks, with_labels=False)
        model.to(options.device).eval()
        rows = []
        for dataset_task in dataset_tasks.values():
            rows.append(measure(Case(model, dataset, collator, dataset_task, options), dataset_task, options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_text_atomic(options.output, json.dumps({"about": options.about, "rows": rows}, indent=1) + "\n")
    print(table(rows), f"written to {options.output}", sep="\n")
    return 1 if options.check and any(row["wrong_answers"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
