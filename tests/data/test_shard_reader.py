"""Samples by their place: the right ones, and faults named."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.reader import MAX_RECORD_BYTES, BadSample
from lvlm_clorae.data.shard_reader import RawSample, ShardReader
from lvlm_clorae.data.shards import Index, read_samples
from lvlm_clorae.errors import UserError
from tests.data.helpers import everywhere, write_toy


def test_a_place_gives_the_sample_written_there(directory: Path, index: Index, reader: ShardReader) -> None:
    for name, entry in index.datasets.items():
        written = list(read_samples(directory, index, name, "train"))
        places = everywhere(entry, "train")
        assert len(entry.splits["train"]) == 2
        for number in random.Random(0).sample(range(len(written)), len(written)):
            assert reader.read(name, "train", places[number])[1:] == written[number]


def test_a_split_that_is_absent_has_no_shards(reader: ShardReader) -> None:
    assert reader.shards("demo_posts", "validation") == ()


def test_a_reader_with_open_files_goes_to_another_process(index: Index, reader: ShardReader) -> None:
    place = Place(1, 1)
    read = reader.read("demo_posts", "train", place)
    copied = pickle.loads(pickle.dumps(reader))
    assert copied.read("demo_posts", "train", place) == read


def test_an_offset_that_is_wrong_names_the_shard(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    entry = index.dataset("toy")
    (shard,) = entry.splits["train"]
    for offset, message in (
        (shard.offsets[2] + 512, "cannot be read as a tar"),
        (shard.offsets[2] + 1024, "follow its"),
    ):
        offsets = (*shard.offsets[:2], offset, *shard.offsets[3:])
        wrong = replace(entry, splits={"train": (replace(shard, offsets=offsets),)})
        with pytest.raises(BadSample, match=rf"toy-train-000000\.tar.*{message}"):
            ShardReader(Index({"toy": wrong}), tmp_path).read("toy", "train", Place(0, 2))


def test_zeros_where_a_sample_should_start_name_shard_and_remedy(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[shard.offsets[3] :] = bytes(len(data) - shard.offsets[3])
    (tmp_path / shard.name).write_bytes(data)
    with pytest.raises(BadSample, match=rf"{shard.name}: no sample at byte {shard.offsets[3]}.*shards verify"):
        ShardReader(index, tmp_path).read("toy", "train", Place(0, 3))


def test_more_bytes_than_a_sample_may_have_are_not_read(tmp_path: Path) -> None:
    """An index from elsewhere must not fill the memory: the shard's bytes are asked for only within bounds."""
    index = write_toy(tmp_path)
    entry = index.dataset("toy")
    (shard,) = entry.splits["train"]

    def read(allotted: int) -> RawSample:
        claimed = replace(shard, bytes=shard.offsets[6] + allotted)
        index = Index({"toy": replace(entry, splits={"train": (claimed,)})})
        return ShardReader(index, tmp_path).read("toy", "train", Place(0, 6))

    assert read(MAX_RECORD_BYTES).key == "000006_toy"
    with pytest.raises(BadSample, match=rf"^{shard.name}: .*{MAX_RECORD_BYTES + 1} bytes, more than the"):
        read(MAX_RECORD_BYTES + 1)


def test_a_shard_cut_off_or_gone_is_named(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[: shard.offsets[4] + 600])
    with pytest.raises(BadSample, match=rf"{shard.name}: cannot be read as a tar"):
        ShardReader(index, tmp_path).read("toy", "train", Place(0, 4))
    path.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: cannot be read \(No such file"):
        ShardReader(index, tmp_path).read("toy", "train", Place(0, 0))
    path.mkdir()
    with pytest.raises(UserError, match=rf"{shard.name}: cannot be read \(Is a directory"):
        ShardReader(index, tmp_path).read("toy", "train", Place(0, 0))


def test_a_sample_that_is_not_sound_names_shard_and_key(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    path = tmp_path / shard.name
    path.write_bytes(
        path.read_bytes().replace(b'"text": "Anna', b'"text": "Anne').replace(b'"text":"Anna', b'"text":"Anne')
    )
    with pytest.raises(BadSample, match=rf"{shard.name}, 000001_toy: not a sound sample"):
        ShardReader(index, tmp_path).read("toy", "train", Place(0, 1))


def test_what_cannot_be_had_is_no_bad_sample(tmp_path: Path) -> None:
    """A policy that goes on at bad samples must not go on without its disk."""
    index = write_toy(tmp_path)
    (tmp_path / index.dataset("toy").splits["train"][0].name).unlink()
    with pytest.raises(UserError) as caught:
        ShardReader(index, tmp_path).read_all("toy", "train", [Place(0, 0)])
    assert not isinstance(caught.value, BadSample)


def test_bad_samples_are_returned_among_the_others(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[shard.offsets[1] : shard.offsets[2]] = bytes(shard.offsets[2] - shard.offsets[1])
    (tmp_path / shard.name).write_bytes(data)
    found = ShardReader(index, tmp_path).read_all("toy", "train", [Place(0, 2), Place(0, 1), Place(0, 0)])
    assert [type(item) for item in found] == [RawSample, BadSample, RawSample]
