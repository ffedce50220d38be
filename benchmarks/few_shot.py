"""Test F1 of a frozen base with examples in the prompt.

    python benchmarks/few_shot.py --model DIR --shards DIR --output scores.json

The examples of a dataset task are the shortest of some training samples with gold, which the seed chooses; each is
given as its prompt and answer, before the prompt to answer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetTask, load_index
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.tasks import build_prompt, format_answer, gold_tuples
from lvlm_clorae.training import distributed
from lvlm_clorae.training.evaluation import Evaluator

CANDIDATES = 20
"""Samples of which the shortest are the examples."""


@dataclass(frozen=True)
class FewShotCollator(Collator):
    """A collate function that puts examples, by dataset task, before each prompt."""

    examples: Mapping[str, str] = field(default_factory=dict)

    def _prepare(self, sample: Any, *how: Any) -> Any:
        row = super()._prepare(sample, *how)
        return row and (self.examples[sample.ref.dataset_task] + row[0], *row[1:])


def examples_of(train: ShardDataset, task: DatasetTask, number: int, seed: int) -> str:
    """Return ``number`` prompts with their answers, each followed by an empty line.

    Raises UserError if the dataset task has fewer samples with gold.
    """
    refs = train.refs(task.name)
    random.Random(f"{seed}/{task.name}").shuffle(refs)
    samples = (train[ref].data for ref in refs)
    found = list(islice((sample for sample in samples if gold_tuples(sample, task.subtask)), CANDIDATES))
    if len(found) < number:
        raise UserError(f"{task.name}: has {len(found)} training samples with gold, fewer than {number} examples.")
    shortest = sorted(found, key=lambda sample: len(sample["tokens"]))[:number]
    asked = [(build_prompt(one, task.subtask, task.labels), format_answer(one, task.subtask)) for one in shortest]
    return "".join(f"{prompt}\nAnswer: {answer}\n\n" for prompt, answer in asked)


def evaluate(
    model: str, shards: Path, *, number: int, seed: int, batch_size: int, max_new_tokens: int, **options: Any
) -> dict[str, Any]:
    """Return counts, precision, recall and F1 on test by dataset task. Raises UserError as ``load_model``."""
    if not torch.distributed.is_initialized():
        distributed.start()
    loaded, processor = load_model(model, **options)
    train = ShardDataset(load_index(shards), shards)
    test = train.of_split("test")
    tasks = train.index.dataset_tasks("test")
    examples = {name: examples_of(train, task, number, seed) for name, task in tasks.items()}
    longest = max(map(processor.prompt_tokens, examples.values()))
    collator = FewShotCollator(processor, tasks, 1024 + longest, max_new_tokens, examples=examples)
    counts = Evaluator(test, collator, batch_size, max_new_tokens)(loaded).counts
    shares = ("precision", "recall", "f1")
    return {name: {**vars(one), **{share: getattr(one, share) for share in shares}} for name, one in counts.items()}


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="preset, directory or Hub id")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the scores")
    parser.add_argument("--examples", type=int, default=3, help="number of examples (3)")
    parser.add_argument("--seed", type=int, default=0, help="seed that draws the examples (0)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    given = vars(parser.parse_args(argv))
    output, number = given.pop("output"), given.pop("examples")
    found = evaluate(number=number, **given)
    write_text_atomic(output, json.dumps({"dataset_tasks": found}, indent=1) + "\n")
    print("\n".join(f"{name}: {values['f1']:.1f}" for name, values in found.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
