"""Distributed evaluation: one generated answer per sample, counts summed over ranks, F1 from the sums."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lvlm_clorae.data.collate import Batch, Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.loader import ShardDataLoader
from lvlm_clorae.data.sampler import SampleRef, evaluation_batches, text_lengths
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.models.constrained import Constraint
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.tasks import Counts, gold_tuples, score_sample
from lvlm_clorae.tasks.schema import SUBTASKS
from lvlm_clorae.training import distributed
from lvlm_clorae.training.preemption import Interrupted, stop_requested, stop_while_waiting

Prediction = dict[str, Any]


@dataclass
class Evaluator:
    """Evaluate a model on a split. The batches, and so the scores, are the same on any number of ranks.

    Args:
        collator: its dataset tasks are evaluated
        batch_size: samples per rank for which answers are generated together
        max_new_tokens: tokens of an answer
        match: how tuples are matched, one of :data:`lvlm_clorae.tasks.MATCHES`
        constrained: restrict answers to label names, words of the text, objects and separators
    """

    dataset: ShardDataset
    collator: Collator
    batch_size: int
    max_new_tokens: int
    match: str = "exact"
    constrained: bool = False
    num_workers: int = 0

    @cached_property
    def batches(self) -> list[list[SampleRef]]:
        """This rank's batches. Collective at the first use: each rank reads its share of the texts' lengths."""
        ranks = distributed.rank(), distributed.world_size()
        dataset_tasks = self.collator.dataset_tasks.values()
        own = text_lengths(self.dataset, dataset_tasks, *ranks)
        lengths = {name: _sum_over_ranks(values) for name, values in own.items()}
        return evaluation_batches(self.dataset, dataset_tasks, lengths, self.batch_size, *ranks)

    def __len__(self) -> int:
        """Return the number of samples of this rank. Collective at the first call."""
        return sum(not ref.is_padding for batch in self.batches for ref in batch)

    def __call__(self, model: Any, advance: Callable[[int], None] = lambda samples: None) -> EvaluationResult:
        """Generate an answer for every sample and score it. Collective.

        Args:
            model: base or PEFT model; the task of each row is set on adapters that have tasks
            advance: called with the number of samples done on this rank

        Raises:
            UserError: a shard cannot be read, or a sample is invalid and the collator's policy is ``error``.
            Interrupted: on every rank, if one of them was asked to stop.
        """
        was_training = model.training
        model.eval()
        counts = {name: Counts() for name in self.collator.dataset_tasks}
        predictions: list[Prediction] = []
        collator = replace(self.collator, with_labels=False)
        loader = ShardDataLoader(
            self.dataset, self.batches, collator, self.num_workers, while_waiting=stop_while_waiting
        )
        for batch in loader:
            for row, answer in enumerate(self._generate(model, batch)):
                if batch.counted[row]:
                    predictions.append(self._score(batch, row, answer, counts))
            advance(sum(batch.counted))
            if distributed.any_rank(stop_requested()):
                raise Interrupted("in the evaluation, which will be repeated")
        model.train(was_training)
        sums = _sum_over_ranks([[count.tp, count.predicted, count.gold] for count in counts.values()])
        summed = {name: Counts(*row) for name, row in zip(counts, sums, strict=True)}
        return EvaluationResult(self.dataset.split, summed, predictions)

    def _generate(self, model: Any, batch: Batch) -> list[str]:
        processor = self.collator.processor
        if hasattr(model, "set_task"):
            model.set_task(batch.dataset_task.task)
        constraint = None
        if self.constrained:
            task = batch.dataset_task
            constraint = Constraint(processor, [(sample, task.subtask, task.labels) for sample in batch.samples])
        # A graph for every length of the cache would take longer to compile than to run
        with distributed.generating(model), torch.compiler.set_stance("force_eager"):
            return generate_answers(
                model,
                processor,
                batch.tensors,
                self.max_new_tokens,
                distributed.device(),
                constraint,
                # Under ZeRO-3 all ranks must do the same number of forwards
                any_rank=distributed.any_rank if distributed.world_size() > 1 else None,
            )

    def _score(self, batch: Batch, row: int, answer: str, counts: dict[str, Counts]) -> Prediction:
        """Score the answer of a row, and add its counts to those of its dataset task."""
        task, sample = batch.dataset_task, batch.samples[row]
        scored, predicted, malformed = score_sample(sample, answer, task.subtask, task.labels, self.match)
        counts[task.name] += scored
        return {
            "dataset": task.dataset,
            "subtask": task.subtask,
            "key": batch.keys[row],
            "prompt": batch.prompts[row],
            "answer": answer,
            "predicted": predicted,
            "malformed": malformed,
            "gold": gold_tuples(sample, task.subtask),
        }


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation."""

    split: str
    counts: dict[str, Counts]
    """Dataset task -> counts, summed over ranks."""
    predictions: list[Prediction] = field(repr=False)
    """Prompt, answer, predicted and gold tuples and malformed pieces of each sample of this rank."""

    def gathered(self) -> list[Prediction]:
        """Return the predictions of all ranks on rank 0, by dataset, sub-task and key; an empty list elsewhere."""
        found = distributed.gathered(self.predictions)
        return sorted(found or [], key=lambda one: (one["dataset"], SUBTASKS.index(one["subtask"]), one["key"]))

    def write(self, folder: Path) -> None:
        """Write ``predictions-<dataset>-<split>.jsonl`` on rank 0. Collective."""
        for dataset, found in groupby(self.gathered(), lambda one: one["dataset"]):
            lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in found]
            write_text_atomic(folder / f"predictions-{dataset}-{self.split}.jsonl", "".join(lines))


def _sum_over_ranks(values: list[Any]) -> list[Any]:
    return distributed.sum_over_ranks(torch.tensor(values, dtype=torch.long, device=distributed.device())).tolist()
