"""Distributed evaluation: every sample generated for once, counts summed over ranks, F1 from the sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lvlm_clorae.data.batches import Batch, Batcher, Instance
from lvlm_clorae.data.instances import share, sorted_batches, text_lengths
from lvlm_clorae.data.stream import BadSamples
from lvlm_clorae.data.units import Unit
from lvlm_clorae.data.workers import leave_signals_to_rank
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.models.constrained import Constraint
from lvlm_clorae.models.generation import choose_tasks, generate_answers
from lvlm_clorae.tasks import Counts, gold_tuples, score_sample
from lvlm_clorae.tasks.schema import SUBTASKS
from lvlm_clorae.training import distributed
from lvlm_clorae.training.preemption import Interrupted, wished

Line = dict[str, Any]


@dataclass
class Evaluation:
    """One split, evaluated as often as wanted. Batches and so scores are the same on any number of ranks.

    Args:
        batcher: of the split
        units: what is asked of it
        batch_size: samples a rank generates for at once
        max_new_tokens: of an answer
        tasks: the adapter's, in its order
        match: how tuples are matched, one of :data:`lvlm_clorae.tasks.MATCHES`
        constrained: whether answers are made of label names, words of the text, objects and separators alone
        workers: processes that read and tokenise ahead
    """

    batcher: Batcher
    units: Sequence[Unit]
    batch_size: int
    max_new_tokens: int
    tasks: Sequence[str] = ()
    match: str = "exact"
    constrained: bool = False
    workers: int = 0

    @cached_property
    def _mine(self) -> list[list[Instance]]:
        """This rank's batches. Collective: each rank reads its part of the split for the lengths of the texts."""
        rank, ranks = distributed.rank(), distributed.world_size()
        reader, split = self.batcher.reader, self.batcher.split
        datasets = dict.fromkeys(unit.dataset for unit in self.units)
        lengths = text_lengths(reader, split, datasets, rank, ranks)
        if ranks > 1:
            lengths = {name: _summed(values) for name, values in lengths.items()}
        return list(share(sorted_batches(reader, split, self.units, lengths, self.batch_size), rank, ranks))

    def __len__(self) -> int:
        """Samples that this rank generates for. Collective at its first call."""
        return sum(not place.wrapped for batch in self._mine for _, place in batch)

    def __call__(self, model: Any, advance: Callable[[int], None] = lambda samples: None) -> Evaluated:
        """Generate for every sample and score the answers. Collective.

        Args:
            model: base or PEFT model; adapters with tasks are told each row's
            advance: called with the number of samples done on this rank

        Raises:
            Interrupted: on every rank, where one of them was told to stop
        """
        was_training = model.training
        model.eval()
        counts, bad = {unit.name: Counts() for unit in self.units}, BadSamples()
        lines: list[Line] = []
        for batch in self.batches():
            bad.add(batch.bad)
            for number, answer in enumerate(self._answers(model, batch)):
                if batch.counted[number]:
                    scored, line = self._score(batch, number, answer)
                    counts[batch.units[number].name] += scored
                    lines.append(line)
            advance(sum(batch.counted))
            if distributed.any_rank(wished()):
                raise Interrupted("in the evaluation, which will be done again")
        model.train(was_training)
        return Evaluated(self.batcher.split, _sum(counts), lines)

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, read anew."""
        # Its own generator: drawing a seed for workers must not move the random state that dropout goes on from.
        loader: DataLoader[Any] = DataLoader(
            self._mine,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=leave_signals_to_rank,
            collate_fn=self._batch,
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _batch(self, instances: list[Instance]) -> Batch | UserError:
        """An error is handed over like a batch: a DataLoader would put a worker's traceback into its message."""
        try:
            return self.batcher(instances, answers=False)
        except UserError as error:
            return error

    def _answers(self, model: Any, batch: Batch) -> list[str]:
        choose_tasks(model, [unit.task for unit in batch.units], self.tasks)
        processor, synced = self.batcher.processor, distributed.world_size() > 1
        tensors = {name: tensor.to(distributed.device()) for name, tensor in batch.tensors.items()}
        asked = [(sample, unit.subtask, unit.labels) for sample, unit in zip(batch.samples, batch.units, strict=True)]
        constraint = Constraint(processor, asked) if self.constrained else None
        with distributed.generating(model):
            return generate_answers(model, processor, tensors, self.max_new_tokens, constraint, synced_gpus=synced)

    def _score(self, batch: Batch, number: int, answer: str) -> tuple[Counts, Line]:
        unit, sample = batch.units[number], batch.samples[number]
        counts, predicted, malformed = score_sample(sample, answer, unit.subtask, unit.labels, self.match)
        line = {
            "dataset": unit.dataset,
            "subtask": unit.subtask,
            "key": batch.keys[number],
            "prompt": batch.prompts[number],
            "answer": answer,
            "predicted": predicted,
            "malformed": malformed,
            "gold": gold_tuples(sample, unit.subtask),
        }
        return counts, line


@dataclass(frozen=True)
class Evaluated:
    """What came out of an evaluation."""

    split: str
    counts: dict[str, Counts]
    """Of each unit, summed over ranks."""
    lines: list[Line] = field(repr=False)
    """Question, answer, predicted and gold tuples and malformed pieces of each sample of this rank."""

    def gathered(self) -> list[Line]:
        """The lines of all ranks on rank 0, sub-task after sub-task and in the order of the keys; empty elsewhere."""
        lines = distributed.gathered(self.lines)
        return sorted(lines or [], key=lambda line: (line["dataset"], SUBTASKS.index(line["subtask"]), line["key"]))

    def write(self, folder: Path) -> None:
        """Write ``predictions-<dataset>-<split>.jsonl``. Collective; rank 0 writes."""
        for dataset, lines in groupby(self.gathered(), lambda line: line["dataset"]):
            texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
            write_text_atomic(folder / f"predictions-{dataset}-{self.split}.jsonl", "".join(texts))


def _summed(values: list[int]) -> list[int]:
    return distributed.sum_over_ranks(torch.tensor(values, device=distributed.device())).tolist()


def _sum(counts: dict[str, Counts]) -> dict[str, Counts]:
    rows = [[count.tp, count.predicted, count.gold] for count in counts.values()]
    summed = distributed.sum_over_ranks(torch.tensor(rows, dtype=torch.long, device=distributed.device())).tolist()
    return {name: Counts(*row) for name, row in zip(counts, summed, strict=True)}
