"""Which samples every rank reads at every micro-step: computed alike everywhere from (seed, epoch), no communication.

A pass over a unit is a sequence of its samples: its shards in a permuted order. The sequence is cut into as many
contiguous lanes of equal length (give or take one) as a *block* has samples; step k of the pass takes the k-th sample
of every lane. A block is what all ranks together read of one unit in a row: it is fixed at the start of a run and
kept in its state, so that the order of samples does not depend on ranks, accumulation or workers. A rank reads its
share of the lanes, so all ranks together read a shard about once. Within a lane's part of a shard the samples are
permuted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray


def _generator(*parts: object) -> np.random.Generator:
    """A random generator that is a function of ``parts`` only: the same on every machine and rank."""
    words = np.frombuffer("/".join(map(str, parts)).encode(), dtype=np.uint8)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words.tolist())))


@dataclass(frozen=True)
class Place:
    """Where a sample is: the shard's number in its split and the sample's in the shard."""

    shard: int
    sample: int
    wrapped: bool = False
    """It only fills a short batch: the sample has its own turn elsewhere."""
    done: bool = False
    """It was trained on before the run was resumed, and only fills the micro-step in which it went on."""


class UnitPass:
    """One pass over a unit: every sample once.

    Args:
        unit: the unit's name, part of the seed
        shard_sizes: samples per shard, in the index's order
        block: samples of this unit that all ranks together read in a row
        seed, epoch: what the order is a function of; ``epoch`` also names the pass, where an epoch has several
    """

    def __init__(self, unit: str, shard_sizes: Sequence[int], block: int, seed: int, epoch: object) -> None:
        self.unit, self.block, self._seed, self._epoch = unit, block, seed, epoch
        self._shards = _generator(seed, epoch, unit, "shards").permutation(len(shard_sizes)).tolist()
        self._starts = [0, *accumulate(shard_sizes[shard] for shard in self._shards)]
        self.samples = self._starts[-1]
        self.steps = -(-self.samples // block)
        self._cuts = [lane * self.samples // block for lane in range(block + 1)]
        self._permutation = lru_cache(maxsize=2 * block)(self._permute)

    def place(self, step: int, lane: int) -> Place:
        """The sample that lane ``lane`` (0..block-1) gives at step ``step`` (0..steps-1) of the pass.

        Lanes differ in length by at most one, so that only the last step may need filling: with the lane's own first
        sample, or, where there are fewer samples than lanes, with another lane's.
        """
        start, stop = self._cuts[lane], self._cuts[lane + 1]
        wrapped = step >= stop - start
        position = start if wrapped else start + step
        if start == stop:
            position = lane % self.samples
        turn = bisect_right(self._starts, position) - 1
        shard_start, shard_stop = self._starts[turn], self._starts[turn + 1]
        first, last = max(start, shard_start), min(max(stop, start + 1), shard_stop)
        if start == stop:
            first, last = position, position + 1
        order = self._permutation(turn, first, last)
        return Place(self._shards[turn], first - shard_start + int(order[position - first]), wrapped)

    def _permute(self, turn: int, first: int, last: int) -> NDArray[np.int64]:
        return _generator(self._seed, self._epoch, self.unit, turn, first).permutation(last - first)


@dataclass(frozen=True)
class Order:
    """What, with an epoch's number, decides the order of all samples: fixed for a run.

    ``proportional`` goes through every unit once an epoch. ``balanced`` gives every unit as many steps as the largest,
    ``temperature`` a share that grows with its size to the power 1 / temperature (1: proportional; the larger the
    flatter). Both go through the largest once, and through the others again and again, each pass in another order.
    """

    seed: int
    block: int
    """Samples of one unit that all ranks together read in a row."""
    interleave: str = "proportional"
    temperature: float = 2.0

    def steps(self, passes: Mapping[str, int]) -> dict[str, int]:
        """Steps of every unit in an epoch, from the steps of one pass."""
        if self.interleave == "proportional":
            return dict(passes)
        largest = max(passes.values())
        power = 0.0 if self.interleave == "balanced" else 1 / self.temperature
        return {unit: max(steps, round(largest * (steps / largest) ** power)) for unit, steps in passes.items()}


class EpochPlan:
    """All units of an epoch, interleaved in proportion to their steps (the low-discrepancy order of a round-robin).

    Args:
        shard_sizes: unit -> samples per shard of its training split
        order, epoch: see :class:`Order`
    """

    def __init__(self, shard_sizes: Mapping[str, Sequence[int]], order: Order, epoch: int) -> None:
        self.order, self.epoch, self._sizes = order, epoch, shard_sizes
        self.units = list(shard_sizes)
        self._pass = lru_cache(maxsize=2 * len(self.units))(self._make_pass)
        passes = {unit: -(-sum(sizes) // order.block) for unit, sizes in shard_sizes.items()}
        self.steps = order.steps(passes)
        """Steps of every unit in this epoch, of a block each."""
        self._of_pass = passes
        turns = [
            (np.arange(steps) + _generator(order.seed, epoch, unit, "phase").random()) / steps
            for unit, steps in self.steps.items()
        ]
        number = np.repeat(np.arange(len(self.units), dtype=np.int32), list(self.steps.values()))
        step = np.concatenate([np.arange(steps, dtype=np.int32) for steps in self.steps.values()])
        by_turn = np.lexsort((step, np.argsort(np.argsort(self.units))[number], np.concatenate(turns)))
        self._units, self._steps = number[by_turn], step[by_turn]

    def __len__(self) -> int:
        """Blocks of the epoch."""
        return len(self._units)

    def block(self, number: int) -> tuple[str, int]:
        """The unit, and its step in the epoch, of block ``number``."""
        return self.units[self._units[number]], int(self._steps[number])

    def place(self, unit: str, step: int, lane: int) -> Place:
        """The sample of a unit's step ``step`` of the epoch and lane ``lane``."""
        turn, step = divmod(step, self._of_pass[unit])
        return self._pass(unit, turn).place(step, lane)

    def _make_pass(self, unit: str, turn: int) -> UnitPass:
        epoch = self.epoch if turn == 0 else f"{self.epoch}.{turn}"
        return UnitPass(unit, self._sizes[unit], self.order.block, self.order.seed, epoch)


@dataclass(frozen=True)
class MicroStep:
    """What one rank does at one micro-step: ``places`` of ``unit``, all ranks the same unit."""

    unit: str
    places: list[Place]


def micro_steps(plan: EpochPlan, rank: int, world_size: int, micro_batch: int, done: int = 0) -> Iterator[MicroStep]:
    """The micro-steps of one rank, after ``done`` samples of the epoch by all ranks together (filling ones included).

    A block is cut into ``block / (world_size * micro_batch)`` micro-steps; rank r takes the r-th share of each. Where
    ``done`` was reached with narrower micro-steps than these, the first one holds places that are marked as done.

    Raises:
        ValueError: the block is not a multiple of what all ranks read at one micro-step.
    """
    wide, block = world_size * micro_batch, plan.order.block
    if block % wide:
        raise ValueError(f"a block of {block} samples cannot be cut into micro-steps of {world_size} x {micro_batch}")
    for start in range(done // wide * wide, len(plan) * block, wide):
        number, first = divmod(start, block)
        unit, step = plan.block(number)
        lanes = range(first + rank * micro_batch, first + (rank + 1) * micro_batch)
        places = [plan.place(unit, step, lane) for lane in lanes]
        if done > start:
            behind = done - number * block
            places = [replace(place, done=lane < behind) for lane, place in zip(lanes, places, strict=True)]
        yield MicroStep(unit, places)
