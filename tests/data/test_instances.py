"""What an evaluation asks: every sample of every unit once, in batches that no number of ranks changes."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.data.batches import Instance
from lvlm_clorae.data.index import DatasetSpec
from lvlm_clorae.data.instances import places_of, share, sorted_batches, text_lengths
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.shards import Index, read_samples
from lvlm_clorae.data.units import Unit, find_units
from tests.data.helpers import TYPES, write_toy

UNIT = Unit("toy/entity", "toy", "entity", "mner", TYPES, None)


def test_lengths_of_all_ranks_are_those_of_the_texts(directory: Path, index: Index, reader: ShardReader) -> None:
    parts = [text_lengths(reader, "train", index.datasets, rank, 3) for rank in range(3)]
    for name in index.datasets:
        texts = [sample["text"] for _, sample, _ in read_samples(directory, index, name, "train")]
        assert [sum(lengths) for lengths in zip(*(part[name] for part in parts), strict=True)] == list(map(len, texts))
        assert len(places_of(reader, name, "train")) == len(texts)


def test_every_sample_once_the_longest_first_and_tasks_together(index: Index, reader: ShardReader) -> None:
    lengths = text_lengths(reader, "train", index.datasets, 0, 1)
    units = find_units(index, "train")
    batches = sorted_batches(reader, "train", units.values(), lengths, 5)
    assert [len(batch) for batch in batches[:-1]] == [5] * (len(batches) - 1)
    asked = [instance for batch in batches for instance in batch]
    assert len({(unit.name, place) for unit, place in asked}) == len(asked)
    for unit in units.values():
        mine = [place for other, place in asked if other.name == unit.name]
        everywhere = places_of(reader, unit.dataset, "train")
        assert sorted(mine, key=everywhere.index) == everywhere
        length = [lengths[unit.dataset][everywhere.index(place)] for place in mine]
        assert length == sorted(length, reverse=True)
        assert len(set(length)) > 1
    tasks = [unit.task for unit, _ in asked]
    assert [task for task, _ in groupby(tasks)] == ["mee", "mner", "mre"]
    assert any(len({unit.task for unit, _ in batch}) > 1 for batch in batches), "5 does not divide a task's samples"


def test_a_sample_that_is_not_sound_has_no_length(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[data.index(b"{", shard.offsets[2])] = ord("[")
    (tmp_path / shard.name).write_bytes(data)
    lengths = text_lengths(ShardReader(index, tmp_path), "train", ["toy"], 0, 1)["toy"]
    assert [number for number, length in enumerate(lengths) if not length] == [2]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 7))
def test_ranks_share_the_same_batches_and_each_has_as_many(samples: int, size: int, ranks: int) -> None:
    asked = [Instance(UNIT, Place(0, number)) for number in range(samples)]
    batches = [asked[start : start + size] for start in range(0, samples, size)]
    shares = [list(share(batches, rank, ranks)) for rank in range(ranks)]
    assert len({len(mine) for mine in shares}) == 1, (
        "under ZeRO-3 a rank with less to do would leave the others waiting"
    )
    real = [batch for mine in shares for batch in mine if not any(place.wrapped for _, place in batch)]
    assert sorted(real, key=batches.index) == batches
    filled = [batch for mine in shares for batch in mine if batch not in real]
    assert all(len(batch) == 1 and batch[0].place.wrapped for batch in filled)
    assert len(filled) == -len(batches) % ranks


def test_a_split_without_samples_has_no_batches(tmp_path: Path) -> None:
    spec = DatasetSpec("toy", "mner", ("entity",), {"entity": TYPES}, {})
    reader = ShardReader(write_toy(tmp_path, spec, (("train", 2),)), tmp_path)
    lengths = text_lengths(reader, "dev", ["toy"], 0, 1)
    assert lengths == {"toy": []}
    assert sorted_batches(reader, "dev", [UNIT], lengths, 4) == []
