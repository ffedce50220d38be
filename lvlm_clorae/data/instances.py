"""What an evaluation asks, and in which batches: alike whatever the ranks, so that they change no score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from lvlm_clorae.data.batches import Instance
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.reader import BadSample
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.units import Unit

Lengths = dict[str, list[int]]
AT_ONCE = 16
"""Samples, with their pictures, that are read for their lengths together: a remote source reads several at a time."""


def places_of(reader: ShardReader, dataset: str, split: str) -> list[Place]:
    """Every sample of a split, in the order written."""
    shards = reader.shards(dataset, split)
    return [Place(number, sample) for number, shard in enumerate(shards) for sample in range(shard.samples)]


def text_lengths(reader: ShardReader, split: str, datasets: Iterable[str], rank: int, world_size: int) -> Lengths:
    """Characters of each sample's text by dataset, of this rank's share; 0 elsewhere, so that the ranks' sum is all.

    A sample that is not sound has no length; what becomes of it is for the batch that it comes into.
    """
    lengths = {}
    for dataset in datasets:
        places = places_of(reader, dataset, split)
        lengths[dataset] = [0] * len(places)
        mine = range(rank, len(places), world_size)
        for start in range(0, len(mine), AT_ONCE):
            numbers = mine[start : start + AT_ONCE]
            for number, raw in zip(
                numbers, reader.read_all(dataset, split, [places[number] for number in numbers]), strict=True
            ):
                lengths[dataset][number] = 0 if isinstance(raw, BadSample) else len(raw.sample["text"])
    return lengths


def sorted_batches(
    reader: ShardReader, split: str, units: Iterable[Unit], lengths: Lengths, batch_size: int
) -> list[list[Instance]]:
    """Every sample of every unit once, task after task and in each unit the longest texts first, cut into batches.

    So rows of a batch are about as long, and what needs the most memory comes early. A batch with the end of one unit
    holds the beginning of the next, which may be another task.
    """
    instances = []
    for unit in sorted(units, key=lambda unit: unit.task):
        places, length = places_of(reader, unit.dataset, split), lengths[unit.dataset]
        by_length = sorted(zip(length, places, strict=True), key=_longest_first)
        instances += [Instance(unit, place) for _, place in by_length]
    return [instances[start : start + batch_size] for start in range(0, len(instances), batch_size)]


def _longest_first(item: tuple[int, Place]) -> int:
    return -item[0]


def share(batches: Sequence[list[Instance]], rank: int, world_size: int) -> Iterator[list[Instance]]:
    """A rank's part of the batches, as many as on every other: under ZeRO-3 all must generate together.

    Where a rank has nothing left it gets a row that is ``wrapped``, not to be counted.
    """
    for start in range(0, len(batches), world_size):
        if start + rank < len(batches):
            yield batches[start + rank]
        else:
            unit, place = batches[start][-1]
            yield [Instance(unit, replace(place, wrapped=True))]
