"""The sampling plan and the batch samplers: which samples each rank reads, and in which order (docs/data.md).

The order is a function of (seed, epoch) and of the size of a global micro-batch, which is fixed for a run. So every
rank computes it without communication, and it does not depend on ranks, gradient accumulation or workers.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from lvlm_clorae.data.index import DatasetTask
from lvlm_clorae.data.reader import InvalidSample
from lvlm_clorae.errors import UserError

if TYPE_CHECKING:
    from lvlm_clorae.data.dataset import ShardDataset

STATE_VERSION = 2
LENGTH_BATCH_SIZE = 16
"""Samples read together for their text lengths; a remote storage reads them concurrently."""


class SampleRef(NamedTuple):
    """The location of a sample: dataset task, position of the shard in the split, of the sample in the shard."""

    dataset_task: str
    shard: int
    sample: int
    is_padding: bool = False
    """The row only fills a short batch; the sample has its own turn elsewhere."""
    is_consumed: bool = False
    """The sample was trained on before the run was resumed, and must not be trained on again."""

    @property
    def dataset(self) -> str:
        return self.dataset_task.partition("/")[0]


def _generator(*parts: object) -> np.random.Generator:
    """Build a random generator that depends on ``parts`` only and is the same on every machine and rank."""
    words = list("/".join(map(str, parts)).encode())
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


class DatasetTaskPass:
    """One pass over a dataset task, every sample once, in an order seeded by its name, ``seed`` and ``epoch``."""

    def __init__(
        self, dataset_task: str, shard_sizes: Sequence[int], global_micro_batch: int, seed: int, epoch: object
    ) -> None:
        self.dataset_task, self._seed, self._epoch = dataset_task, seed, epoch
        self._shards = _generator(seed, epoch, dataset_task, "shards").permutation(len(shard_sizes)).tolist()
        self._starts = [0, *accumulate(shard_sizes[shard] for shard in self._shards)]
        self.samples = self._starts[-1]
        self.steps = -(-self.samples // global_micro_batch)
        self._cuts = [partition * self.samples // global_micro_batch for partition in range(global_micro_batch + 1)]
        self._permutation = lru_cache(maxsize=2 * global_micro_batch)(self._permute)

    def sample_ref(self, step: int, partition: int) -> SampleRef:
        """Return the sample of one partition (of ``global_micro_batch``) at one step (of ``steps``) of the pass.

        The lengths of partitions differ by at most one, so only the last step may need padding: the partition's own
        first sample or, where there are fewer samples than partitions, a sample of another partition.
        """
        start, stop = self._cuts[partition], self._cuts[partition + 1]
        is_padding = step >= stop - start
        position = start if is_padding else start + step
        if start == stop:
            position = partition % self.samples
            start, stop = position, position + 1
        turn = bisect_right(self._starts, position) - 1
        shard_start, shard_stop = self._starts[turn], self._starts[turn + 1]
        first, last = max(start, shard_start), min(stop, shard_stop)
        sample = first - shard_start + int(self._permutation(turn, first, last)[position - first])
        return SampleRef(self.dataset_task, self._shards[turn], sample, is_padding)

    def _permute(self, turn: int, first: int, last: int) -> NDArray[np.int64]:
        return _generator(self._seed, self._epoch, self.dataset_task, turn, first).permutation(last - first)


@dataclass(frozen=True)
class SamplingPlan:
    """The settings that decide the order of all samples; fixed for a run.

    Args:
        global_micro_batch: samples of one dataset task that all ranks together read in a row
        interleave: ``proportional`` goes through every dataset task once an epoch. ``balanced`` gives every dataset
            task as many steps as the largest; ``temperature`` a share proportional to its size to the power
            1 / temperature. Both go through the largest once and repeat the others, in another order each time.
        temperature: 1 is proportional; the larger, the more uniform
    """

    seed: int
    global_micro_batch: int
    interleave: str = "proportional"
    temperature: float = 2.0

    def steps(self, pass_steps: Mapping[str, int]) -> dict[str, int]:
        """Return the steps of every dataset task in an epoch, given the steps of one pass."""
        if self.interleave == "proportional":
            return dict(pass_steps)
        power = {"balanced": 0.0, "temperature": 1 / self.temperature}[self.interleave]
        largest = max(pass_steps.values())
        return {name: max(steps, round(largest * (steps / largest) ** power)) for name, steps in pass_steps.items()}


class EpochPlan:
    """All dataset tasks of an epoch, interleaved in proportion to their steps (a low-discrepancy round-robin)."""

    def __init__(self, shard_sizes: Mapping[str, Sequence[int]], plan: SamplingPlan, epoch: int) -> None:
        self.plan, self.epoch, self._shard_sizes = plan, epoch, shard_sizes
        self._names, size = sorted(shard_sizes), plan.global_micro_batch
        self._pass = lru_cache(maxsize=2 * len(self._names))(self._make_pass)
        self._pass_steps = {name: -(-sum(shard_sizes[name]) // size) for name in self._names}
        self.steps = plan.steps(self._pass_steps)
        """Steps of every dataset task in this epoch, each of a global micro-batch."""
        shifts = np.array([_generator(plan.seed, epoch, name, "phase").random() for name in self._names])
        steps = np.array(list(self.steps.values()))
        number = np.repeat(np.arange(len(steps), dtype=np.int32), steps)
        step = np.concatenate([np.arange(count, dtype=np.int32) for count in steps])
        order = np.lexsort((step, number, (step + shifts[number]) / steps[number]))
        self._numbers, self._steps = number[order], step[order]

    def __len__(self) -> int:
        """Return the number of global micro-batches in the epoch."""
        return len(self._numbers)

    def global_micro_batch(self, number: int) -> tuple[str, int]:
        """Return the dataset task of a global micro-batch, and its step in the epoch."""
        return self._names[self._numbers[number]], int(self._steps[number])

    def _make_pass(self, dataset_task: str, number: int) -> DatasetTaskPass:
        sizes, epoch = self._shard_sizes[dataset_task], f"{self.epoch}.{number}" if number else self.epoch
        return DatasetTaskPass(dataset_task, sizes, self.plan.global_micro_batch, self.plan.seed, epoch)

    def micro_batches(
        self, rank: int, world_size: int, batch_size: int, consumed_samples: int = 0
    ) -> Iterator[list[SampleRef]]:
        """Yield the micro-batches of one rank, after the ``consumed_samples`` that all ranks have read with padding.

        A global micro-batch is cut into micro-steps of ``world_size * batch_size`` samples, and rank r takes the r-th
        share of each. If ``consumed_samples`` was reached with smaller micro-steps than these, samples of the first
        micro-step may be marked ``is_consumed``.
        """
        width, size = world_size * batch_size, self.plan.global_micro_batch
        for start in range(consumed_samples // width * width, len(self) * size, width):
            number, first = divmod(start + rank * batch_size, size)
            dataset_task, step = self.global_micro_batch(number)
            repetition, step = divmod(step, self._pass_steps[dataset_task])
            one = self._pass(dataset_task, repetition)
            refs = [one.sample_ref(step, first + row) for row in range(batch_size)]
            consumed = consumed_samples - start - rank * batch_size
            yield [ref._replace(is_consumed=True) if row < consumed else ref for row, ref in enumerate(refs)]


class DistributedTaskBatchSampler(Sampler[list[SampleRef]]):
    """Yield this rank's micro-batches of an epoch, from ``consumed_samples`` on; all ranks get the same dataset task.

    Workers read ahead of training, so iterating does not move the position: call :meth:`advance` for every micro-batch
    that was trained on (:class:`~lvlm_clorae.data.loader.ShardDataLoader` does).

    Args:
        plan: its global micro-batch is a multiple of ``world_size * batch_size``, otherwise UserError is raised
        batch_size: samples per rank and micro-step
    """

    def __init__(
        self,
        dataset: ShardDataset,
        dataset_tasks: Mapping[str, DatasetTask],
        plan: SamplingPlan,
        *,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
    ) -> None:
        self.dataset, self.dataset_tasks, self.plan = dataset, dataset_tasks, plan
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self.set_epoch(0)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        return self._epoch_plan.micro_batches(self.rank, self.world_size, self.batch_size, self.consumed_samples)

    def __len__(self) -> int:
        """Return the number of micro-steps in the whole epoch."""
        return len(self._epoch_plan) * self.plan.global_micro_batch // self.samples_per_micro_step

    @property
    def samples_per_micro_step(self) -> int:
        """Samples that all ranks together read at one micro-step."""
        return self.world_size * self.batch_size

    @property
    def micro_step(self) -> int:
        """Micro-steps of the epoch that are complete."""
        return self.consumed_samples // self.samples_per_micro_step

    def advance(self) -> None:
        """Count one micro-step as consumed."""
        self.consumed_samples = (self.micro_step + 1) * self.samples_per_micro_step

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        size = self.plan.global_micro_batch
        if size % self.samples_per_micro_step:
            raise UserError(
                f"A global micro-batch of {size} samples cannot be divided among {self.world_size} ranks of "
                f"{self.batch_size} samples. Choose ranks and a batch size whose product divides {size}."
            )
        self.epoch, self.consumed_samples = epoch, 0
        shards = {name: self.dataset.shards(task.dataset) for name, task in self.dataset_tasks.items()}
        sizes = {name: [shard.samples for shard in entries] for name, entries in shards.items()}
        self._epoch_plan = EpochPlan(sizes, self.plan, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the plan and a fingerprint of each dataset's shards; a few hundred bytes."""
        position = {"epoch": self.epoch, "consumed_samples": self.consumed_samples}
        return {"version": STATE_VERSION, **position, **asdict(self.plan), "shards": self._fingerprints()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position, with the saved plan, on any ranks. Raises UserError if it does not fit."""
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"The sampler's state has version {state.get('version')!r}, but this release reads {STATE_VERSION}. "
                "Resume with the release that wrote it."
            )
        if changed := {name for name, _ in state["shards"].items() ^ self._fingerprints().items()}:
            raise UserError(
                f"The training shards of {', '.join(sorted(changed))} are not those that the run started with. "
                "Use those shards again, or start another run."
            )
        if not all(type(state[name]) is int and state[name] >= 0 for name in ("epoch", "consumed_samples")):
            raise ValueError("epoch and consumed_samples must be integers from 0")
        self.plan = SamplingPlan(**{field.name: state[field.name] for field in fields(SamplingPlan)})
        self.set_epoch(state["epoch"])
        self.consumed_samples = state["consumed_samples"]

    def _fingerprints(self) -> dict[str, str]:
        names = sorted({task.dataset for task in self.dataset_tasks.values()})
        texts = {name: "".join(f"{s.sha256}/{s.samples}\n" for s in self.dataset.shards(name)) for name in names}
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def evaluation_batches(
    dataset: ShardDataset,
    dataset_tasks: Iterable[DatasetTask],
    lengths: Mapping[str, Sequence[int]],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[SampleRef]]:
    """Return this rank's batches of an evaluation: every sample of every dataset task once, the longest texts first.

    The rows of a batch have one dataset task, so their prompts begin alike, and about the same length. The batches do
    not depend on the number of ranks. Every rank gets as many (under ZeRO-3 all must generate together): a rank with
    nothing left gets one padding row. ``lengths`` are those of each dataset's samples, see :func:`text_lengths`.

    Raises ValueError for a ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1: {batch_size}.")
    batches: list[list[SampleRef]] = []
    for task in dataset_tasks:
        pairs = zip(lengths[task.dataset], dataset.refs(task.name), strict=True)
        refs = [ref for _, ref in sorted(pairs, key=lambda pair: -pair[0])]
        batches += [refs[start : start + batch_size] for start in range(0, len(refs), batch_size)]
    padding = [[batches[-1][-1]._replace(is_padding=True)]] if rank >= len(batches) % world_size > 0 else []
    return batches[rank::world_size] + padding


def text_lengths(
    dataset: ShardDataset, dataset_tasks: Iterable[DatasetTask], rank: int, world_size: int
) -> dict[str, list[int]]:
    """Return, for each dataset, the characters of each sample's text. Raises UserError if a shard cannot be read.

    The length is 0 for invalid samples and for those of other ranks, so that the sum over ranks has all lengths.
    """
    lengths = {}
    for name, dataset_task in {task.dataset: task.name for task in dataset_tasks}.items():
        refs = dataset.refs(dataset_task)
        lengths[name] = [0] * len(refs)
        for start in range(rank, len(refs), world_size * LENGTH_BATCH_SIZE):
            own = range(start, len(refs), world_size)[:LENGTH_BATCH_SIZE]
            for number, sample in zip(own, dataset.__getitems__([refs[n] for n in own]), strict=True):
                if sample.error and not isinstance(sample.error, InvalidSample):
                    raise sample.error
                lengths[name][number] = len(sample.data.get("text", ""))
    return lengths
