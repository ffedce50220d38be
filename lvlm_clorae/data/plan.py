"""Which samples every rank reads at every micro-step: computed alike everywhere from (seed, epoch), no communication.

An epoch of a unit is a sequence of its samples: its shards in a permuted order. The sequence is cut into as many
contiguous lanes of equal length (give or take one) as a *block* has samples; step k of the unit takes the k-th sample
of every lane. A block is what all ranks together read of one unit in a row: it is fixed at the start of a run and
kept in its state, so that the order of samples does not depend on ranks, accumulation or workers. A rank reads its
share of the lanes, so all ranks together read a shard about once. Within a lane's part of a shard the samples are
permuted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np


def _generator(*parts: object) -> np.random.Generator:
    """A random generator that is a function of ``parts`` only: the same on every machine and rank."""
    words = np.frombuffer("/".join(map(str, parts)).encode(), dtype=np.uint8)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words.tolist())))


@dataclass(frozen=True)
class Place:
    """Where a sample is: the shard's number in its split, the sample's in the shard, and whether it only fills."""

    shard: int
    sample: int
    wrapped: bool


class UnitEpoch:
    """One epoch of one unit.

    Args:
        unit: the unit's name, part of the seed
        shard_sizes: samples per shard, in the index's order
        block: samples of this unit that all ranks together read in a row
    """

    def __init__(self, unit: str, shard_sizes: Sequence[int], block: int, seed: int, epoch: int) -> None:
        self.unit, self.block, self._seed, self._epoch = unit, block, seed, epoch
        self._shards = _generator(seed, epoch, unit, "shards").permutation(len(shard_sizes)).tolist()
        self._starts = [0, *accumulate(shard_sizes[shard] for shard in self._shards)]
        self.samples = self._starts[-1]
        self.steps = -(-self.samples // block)
        self._cuts = [lane * self.samples // block for lane in range(block + 1)]
        self._permutation = lru_cache(maxsize=2 * block)(self._permute)

    def place(self, step: int, lane: int) -> Place:
        """The sample that lane ``lane`` (0..block-1) gives at step ``step`` (0..steps-1) of the unit.

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
        return Place(self._shards[turn], first - shard_start + order[position - first], wrapped)

    def _permute(self, turn: int, first: int, last: int) -> list[int]:
        return _generator(self._seed, self._epoch, self.unit, turn, first).permutation(last - first).tolist()


class EpochPlan:
    """All units of an epoch, interleaved in proportion to their steps (the low-discrepancy order of a round-robin).

    Args:
        shard_sizes: unit -> samples per shard of its training split
        block, seed, epoch: see :class:`UnitEpoch`
    """

    def __init__(self, shard_sizes: Mapping[str, Sequence[int]], block: int, seed: int, epoch: int) -> None:
        self.units = {unit: UnitEpoch(unit, sizes, block, seed, epoch) for unit, sizes in shard_sizes.items()}
        turns = []
        for unit, plan in self.units.items():
            phase = _generator(seed, epoch, unit, "phase").random()
            turns += [((k + phase) / plan.steps, unit, k) for k in range(plan.steps)]
        self.blocks = [(unit, k) for _, unit, k in sorted(turns)]
        """The unit and its step for every block of the epoch."""

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class MicroStep:
    """What one rank does at one micro-step: ``places`` of ``unit``, all ranks the same unit."""

    unit: str
    places: list[Place]


def micro_steps(plan: EpochPlan, rank: int, world_size: int, micro_batch: int, start: int = 0) -> Iterator[MicroStep]:
    """The micro-steps of one rank from number ``start`` of the epoch on.

    A block is cut into ``block / (world_size * micro_batch)`` micro-steps; rank r takes the r-th share of each.

    Raises:
        ValueError: the block is not a multiple of what all ranks read at one micro-step.
    """
    wide = world_size * micro_batch
    block = next(iter(plan.units.values())).block
    if block % wide:
        raise ValueError(f"a block of {block} samples cannot be cut into micro-steps of {world_size} x {micro_batch}")
    per_block = block // wide
    for number in range(start, len(plan) * per_block):
        unit, step = plan.blocks[number // per_block]
        first = (number % per_block) * wide + rank * micro_batch
        places = [plan.units[unit].place(step, lane) for lane in range(first, first + micro_batch)]
        yield MicroStep(unit, places)
