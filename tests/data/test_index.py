"""index.json: every way in which it can be wrong is a UserError that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.index import index_json
from lvlm_clorae.data.shards import load_index, parse_index
from lvlm_clorae.errors import UserError

from .helpers import write_toy


def test_the_text_reads_back_as_the_same_index(tmp_path: Path) -> None:
    index = write_toy(tmp_path, max_samples=3)
    text = (tmp_path / "index.json").read_text(encoding="utf-8")
    assert index_json(index) == text
    assert parse_index(json.loads(text), "x") == index
    assert list(index.dataset("toy").splits) == ["train", "test"]


def test_a_missing_directory_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such directory.*shards build"):
        load_index(tmp_path / "absent")


def test_a_directory_without_index_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no index\.json.*shards build"):
        load_index(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000, '{"version": 1'])
def test_text_that_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match="not valid JSON"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not an index"),
        ({}, "not an index"),
        ({"version": 2, "datasets": {}}, "format version 2"),
        ({"version": "1", "datasets": {}}, "format version '1'"),
        ({"version": 1}, '"datasets" must be'),
        ({"version": 1, "datasets": {}}, "no datasets"),
        ({"version": 1, "datasets": {"toy": []}}, "must be an object"),
        ({"version": 1, "datasets": {"../toy": {}}}, "name that is not allowed"),
    ],
)
def test_another_form(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_index(data, "here/index.json")


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(dataset: Any) -> None:
        *parents, last = path.split(".")
        for key in parents:
            dataset = dataset[int(key) if key.isdigit() else key]
        dataset[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("task", 1), '"task"'),
        (_set("subtasks", []), '"subtasks"'),
        (_set("labels", {}), '"labels"'),
        (_set("labels", {"entity": []}), '"labels"'),
        (_set("labels", {"entity": {"types": [1]}}), '"labels"'),
        (_set("reference_f1", {"entity": 0}), '"reference_f1"'),
        (_set("reference_f1", {"entity": float("nan")}), '"reference_f1"'),
        (_set("splits", {}), '"splits"'),
        (_set("splits", {"valid": []}), "not among train, dev, test"),
        (_set("splits.train", []), "list of shards"),
        (_set("splits.train", [1]), "a shard must be an object"),
        (_set("splits.train.0.name", "/etc/passwd.tar"), "no plain name"),
        (_set("splits.train.0.name", "../other/a.tar"), "no plain name"),
        (_set("splits.train.0.name", "..tar"), "no plain name"),
        (_set("splits.train.0.name", "a\\b.tar"), "no plain name"),
        (_set("splits.train.0.name", "index.json"), "no plain name"),
        (_set("splits.train.0.samples", 0), "positive whole numbers"),
        (_set("splits.train.0.samples", True), "positive whole numbers"),
        (_set("splits.train.0.bytes", 1.5), "positive whole numbers"),
        (_set("splits.train.0.sha256", "0"), "hexadecimal"),
        (_set("splits.train.0.offsets", [0]), "one whole number for each"),
        (_set("splits.train.0.offsets", [0, 5, 5]), "must rise"),
        (_set("splits.train.0.offsets", [512, 1024, 2048]), "must rise"),
        (_set("splits.train.0.offsets", [0, 512, 10**9]), "must rise"),
        (lambda dataset: dataset["splits"]["train"].append(dataset["splits"]["train"][0]), "lists a shard twice"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    write_toy(tmp_path, max_samples=3)
    data = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    change(data["datasets"]["toy"])
    (tmp_path / "index.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=f'malformed, dataset "toy".*{message}'):
        load_index(tmp_path)


def test_a_missing_shard_is_found_at_once(tmp_path: Path) -> None:
    write_toy(tmp_path)
    (tmp_path / "toy-test-000000.tar").unlink()
    with pytest.raises(UserError, match=r"toy-test-000000\.tar: the shard is missing"):
        load_index(tmp_path)
    assert load_index(tmp_path, check_files=False).units("test") == ["toy/entity"]


def test_a_shard_cut_off_is_found_at_once(tmp_path: Path) -> None:
    write_toy(tmp_path)
    shard = tmp_path / "toy-train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"toy-train-000000\.tar: has \d+ bytes where"):
        load_index(tmp_path)


def test_an_unknown_dataset_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='Did you mean "toy"'):
        write_toy(tmp_path).dataset("toys")
