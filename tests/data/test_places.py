"""Places of shards: what a user may write, and how several become one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lvlm_clorae.data.places import open_shards
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.errors import UserError
from tests.data.helpers import SPEC, write_toy
from tests.data.server import serve


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
