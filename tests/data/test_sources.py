"""Places of shards: what a user may write, how several become one, and that files are read as they are shared."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.sources import MAX_OPEN_SHARDS, LocalSource, open_shards
from lvlm_clorae.errors import UserError
from tests.data.helpers import SPEC, write_toy
from tests.data.server import serve


def test_open_files_are_bounded(tmp_path: Path) -> None:
    index = write_toy(tmp_path, counts=(("train", 40),), max_samples=1)
    source = LocalSource(tmp_path)
    reader = ShardReader(index, {"toy": source})
    for _ in range(2):
        keys = [reader.read("toy", "train", Place(number, 0)).key for number in range(40)]
        assert keys == [f"{number:06d}_toy" for number in range(40)]
    handles = list(source._open.values())
    assert len(handles) == MAX_OPEN_SHARDS
    source.close()
    assert all(handle.closed for handle in handles)


def test_reading_moves_no_offset_that_forked_workers_share(tmp_path: Path) -> None:
    """A forked process has its parent's open files with one offset for both: a seek of one would move the other's."""
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    source = LocalSource(tmp_path)
    source.read(shard, 0, 10)
    (handle,) = source._open.values()
    before = os.lseek(handle.fileno(), 0, os.SEEK_CUR)
    source.read(shard, 512, 1024)
    assert os.lseek(handle.fileno(), 0, os.SEEK_CUR) == before


def test_braces_name_several_places_whose_datasets_become_one_index(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_toy(tmp_path / name, replace(SPEC, name=name))
    index, sources = open_shards(f"{tmp_path}/{{second,first}}")
    assert list(index.datasets) == ["first", "second"]
    assert {name: source.name for name, source in sources.items()} == {
        "first": str(tmp_path / "first"),
        "second": str(tmp_path / "second"),
    }
    reader = ShardReader(index, sources)
    assert reader.read("second", "train", Place(0, 1)).sample["dataset"] == "second"
    with serve(tmp_path) as server:
        index, sources = open_shards(f"{server.url}/{{first,second}}/")
        assert ShardReader(index, sources).read("first", "test", Place(0, 0)).sample["dataset"] == "first"


def test_a_dataset_in_two_places_is_named_with_both(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_toy(tmp_path / name)
    with pytest.raises(UserError, match=rf'{tmp_path}/b: has the dataset "toy", as {tmp_path}/a has'):
        open_shards(f"{tmp_path}/{{a,b}}")


def test_a_file_url_and_a_home_are_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy(tmp_path / "shards")
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (f"file://{tmp_path}/shards", "~/shards"):
        assert list(open_shards(place)[0].datasets) == ["toy"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/nowhere/{a,b}", "/nowhere/a: no such directory"),
        ("s3x://bucket/shards", "s3x://bucket/shards: neither a directory nor an address"),
        ("pipe:cat /data/shards", r"needs \{\} where the name of the file is to stand"),
        ("pipe:cat /data/{}", "gives whole files only.*--cache-dir"),
        ("gs://bucket/shards", "gives whole files only.*--cache-dir"),
    ],
)
def test_places_that_cannot_be_read_say_what_to_do(place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_shards(place)
