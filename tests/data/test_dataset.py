"""The dataset: the right sample for each location, and faults that name shard and key."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lvlm_clorae.data.dataset import Sample, ShardDataset
from lvlm_clorae.data.index import Index
from lvlm_clorae.data.reader import MAX_SAMPLE_BYTES, InvalidSample, read_sample, read_samples
from lvlm_clorae.data.sampler import SampleRef
from lvlm_clorae.data.storage import LocalStorage
from lvlm_clorae.errors import UserError
from tests.helpers.shards import write_toy


def toy(sample: int) -> SampleRef:
    return SampleRef("toy/entity", 0, sample)


def test_a_location_gives_the_sample_written_there(directory: Path, index: Index, dataset: ShardDataset) -> None:
    for name, entry in index.datasets.items():
        written = list(read_samples(directory, index, name, "train"))
        refs = dataset.refs(f"{name}/{entry.subtasks[0]}")
        assert len(dataset.shards(name)) == 2
        assert len(refs) == len(written)
        order = random.Random(0).sample(range(len(written)), len(written))
        samples = dataset.__getitems__([refs[number] for number in order])
        assert [(one.key, one.data, one.image) for one in samples] == [written[number] for number in order]
        assert samples == [dataset[refs[number]] for number in order]


def test_a_limit_keeps_the_first_samples_of_a_dataset_task(dataset: ShardDataset) -> None:
    every = dataset.refs("demo_news/entity")
    for limit in (1, 11, 99):  # the first shard has ten
        dataset.limit = limit
        assert dataset.refs("demo_news/entity") == every[:limit]


def test_samples_of_several_datasets_keep_their_order(dataset: ShardDataset) -> None:
    names = ["demo_news/entity", "demo_posts/entity", "demo_news/entity"]
    refs = [SampleRef(name, 0, number) for number, name in enumerate(names)]
    assert [sample.ref for sample in dataset.__getitems__(refs)] == refs
    assert [sample.data["dataset"] for sample in dataset.__getitems__(refs)] == [ref.dataset for ref in refs]


def test_another_split_has_other_samples_and_an_absent_one_none(dataset: ShardDataset) -> None:
    assert [len(dataset.of_split(split).refs("demo_posts/entity")) for split in ("train", "dev", "test")] == [12, 5, 2]
    assert dataset.of_split("validation").shards("demo_posts") == ()


def test_a_dataset_with_open_files_goes_to_another_process(dataset: ShardDataset) -> None:
    ref = SampleRef("demo_posts/entity", 1, 1)
    sample = dataset[ref]
    assert pickle.loads(pickle.dumps(dataset))[ref] == sample


def test_a_wrong_offset_names_the_shard(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    entry = index.dataset("toy")
    (shard,) = entry.splits["train"]
    for shift in (512, 1024):
        offsets = (*shard.offsets[:2], shard.offsets[2] + shift, *shard.offsets[3:])
        wrong = replace(entry, splits={"train": (replace(shard, offsets=offsets),)})
        with pytest.raises(InvalidSample, match=r"toy-train-000000\.tar"):
            ShardDataset(Index({"toy": wrong}), tmp_path)[toy(2)]


def test_zeros_instead_of_a_sample_name_shard_and_fix(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[shard.offsets[3] :] = bytes(len(data) - shard.offsets[3])
    (tmp_path / shard.name).write_bytes(data)
    with pytest.raises(InvalidSample, match=rf"{shard.name}.*byte {shard.offsets[3]}.*shards verify"):
        ShardDataset(index, tmp_path)[toy(3)]


def test_more_bytes_than_a_sample_may_have_are_not_read(tmp_path: Path) -> None:
    """An index from elsewhere must not fill the memory: bytes are requested only within bounds."""
    index = write_toy(tmp_path)
    entry = index.dataset("toy")
    (shard,) = entry.splits["train"]

    def read(size: int) -> Sample:
        claimed = replace(shard, bytes=shard.offsets[6] + size)
        return ShardDataset(Index({"toy": replace(entry, splits={"train": (claimed,)})}), tmp_path)[toy(6)]

    assert read(MAX_SAMPLE_BYTES).key == "000006_toy"
    with pytest.raises(InvalidSample, match=rf"^{shard.name}: .*{MAX_SAMPLE_BYTES + 1} bytes"):
        read(MAX_SAMPLE_BYTES + 1)


def test_a_truncated_or_missing_shard_is_named(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[: shard.offsets[4] + 600])
    with pytest.raises(InvalidSample, match=shard.name):
        ShardDataset(index, tmp_path)[toy(4)]
    path.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}.*No such file") as caught:
        ShardDataset(index, tmp_path)[toy(0)]
    assert not isinstance(caught.value, InvalidSample), "no policy may continue without its storage"
    path.mkdir()
    with pytest.raises(UserError, match=rf"{shard.name}.*Is a directory"):
        ShardDataset(index, tmp_path)[toy(0)]


def test_an_invalid_sample_names_shard_and_key(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    path = tmp_path / shard.name
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"text":"Anna', b'"text":"Anne'))
    assert path.read_bytes() != data
    with pytest.raises(InvalidSample, match=rf"^{shard.name}, 000001_toy: "):
        ShardDataset(index, tmp_path)[toy(1)]


def test_errors_are_returned_among_the_samples_of_a_batch(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    (shard,) = index.dataset("toy").splits["train"]
    data = bytearray((tmp_path / shard.name).read_bytes())
    data[shard.offsets[1] : shard.offsets[2]] = bytes(shard.offsets[2] - shard.offsets[1])
    (tmp_path / shard.name).write_bytes(data)
    refs = [toy(2), toy(1), toy(0)]
    samples = ShardDataset(index, tmp_path).__getitems__(refs)
    assert [sample.ref for sample in samples] == refs
    assert [type(sample.error) for sample in samples] == [type(None), InvalidSample, type(None)]
    (tmp_path / shard.name).unlink()
    assert {type(sample.error) for sample in ShardDataset(index, tmp_path).__getitems__(refs)} == {UserError}


def test_samples_that_an_index_leaves_out_are_noticed(tmp_path: Path) -> None:
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    fewer = replace(shard, samples=shard.samples - 1, offsets=[*shard.offsets[:2], *shard.offsets[3:]])
    read_sample(LocalStorage(tmp_path), fewer, 0)
    with pytest.raises(InvalidSample, match=rf"{shard.name}: 2 samples at byte {shard.offsets[1]}"):
        read_sample(LocalStorage(tmp_path), fewer, 1)
