"""Distributed evaluation: every sample generated for once, counts summed over ranks, F1 from the sums."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lvlm_clorae.data.batches import Batch, Batcher, Instance
from lvlm_clorae.data.instances import share, sorted_batches, text_lengths
from lvlm_clorae.data.stream import BadSamples
from lvlm_clorae.data.units import Unit
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.tasks import Counts, gold_tuples, score_sample
from lvlm_clorae.tasks.schema import SUBTASKS
from lvlm_clorae.training import distributed

Line = dict[str, Any]


@dataclass
class Evaluation:
    """One split, evaluated as often as wanted. Batches and so scores are the same on any number of ranks.

    Args:
        batcher: of the split
        units: what is asked of it
        batch_size: samples a rank generates for at once
        max_new_tokens: of an answer
        tasks: the adapter's, in its order; None where it has none
        workers: processes that read and tokenise ahead
    """

    batcher: Batcher
    units: Sequence[Unit]
    batch_size: int
    max_new_tokens: int
    tasks: list[str] | None = None
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

    def __call__(
        self, model: Any, predictions: Path | None = None, advance: Callable[[int], None] = lambda samples: None
    ) -> dict[str, Counts]:
        """Generate for every sample and score the answers. Collective; the same on every rank.

        Args:
            model: base or PEFT model; adapters with tasks are told each row's
            predictions: directory for ``predictions-<dataset>-<split>.jsonl``, written by rank 0
            advance: called with the number of samples done on this rank

        Returns:
            counts per unit, summed over ranks.
        """
        was_training = model.training
        model.eval()
        counts, bad = {unit.name: Counts() for unit in self.units}, BadSamples()
        lines: list[Line] = []
        for batch in self._batches():
            bad.add(batch.bad)
            for number, answer in enumerate(self._answers(model, batch)):
                if batch.counted[number]:
                    counts[batch.units[number].name] += self._score(batch, number, answer, lines)
            advance(sum(batch.counted))
        model.train(was_training)
        if predictions:
            _write(distributed.gathered(lines), predictions, self.batcher.split)
        return _sum(counts)

    def _batches(self) -> Iterator[Batch]:
        # Its own generator: drawing a seed for workers must not move the random state that dropout goes on from.
        loader: DataLoader[Any] = DataLoader(
            self._mine,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.workers,
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
        if self.tasks is not None:
            task, *others = dict.fromkeys(unit.task for unit in batch.units)
            rows = [self.tasks.index(unit.task) for unit in batch.units]
            model.set_task(torch.tensor(rows) if others else task)  # of one task the batch is routed densely
        tensors = {name: tensor.to(distributed.device()) for name, tensor in batch.tensors.items()}
        with distributed.generating(model):
            return generate_answers(
                model, self.batcher.processor, tensors, self.max_new_tokens, synced_gpus=distributed.world_size() > 1
            )

    def _score(self, batch: Batch, number: int, answer: str, lines: list[Line]) -> Counts:
        unit, sample = batch.units[number], batch.samples[number]
        counts, predicted, malformed = score_sample(sample, answer, unit.subtask, unit.labels)
        lines.append(
            {
                "dataset": unit.dataset,
                "subtask": unit.subtask,
                "key": batch.keys[number],
                "prompt": batch.prompts[number],
                "answer": answer,
                "predicted": predicted,
                "malformed": malformed,
                "gold": gold_tuples(sample, unit.subtask),
            }
        )
        return counts


def _summed(values: list[int]) -> list[int]:
    return distributed.sum_over_ranks(torch.tensor(values, device=distributed.device())).tolist()


def _sum(counts: dict[str, Counts]) -> dict[str, Counts]:
    rows = [[count.tp, count.predicted, count.gold] for count in counts.values()]
    summed = distributed.sum_over_ranks(torch.tensor(rows, dtype=torch.long, device=distributed.device())).tolist()
    return {name: Counts(*row) for name, row in zip(counts, summed, strict=True)}


def _write(lines: list[Line] | None, folder: Path, split: str) -> None:
    """A file a dataset, sub-task after sub-task, in the order of the keys; ``lines`` are None but on rank 0."""
    by_dataset = defaultdict(list)
    for line in sorted(lines or [], key=lambda line: (SUBTASKS.index(line["subtask"]), line["key"])):
        by_dataset[line.pop("dataset")].append(json.dumps(line, ensure_ascii=False) + "\n")
    for dataset, texts in by_dataset.items():
        write_text_atomic(folder / f"predictions-{dataset}-{split}.jsonl", "".join(texts))
