"""index.json: every fault is a UserError that names it and says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.index import decode_index, load_index
from lvlm_clorae.errors import UserError
from tests.helpers.shards import write_toy


def test_the_text_reads_back_as_the_same_index(tmp_path: Path) -> None:
    index = write_toy(tmp_path, max_samples=3)
    text = (tmp_path / "index.json").read_text(encoding="utf-8")
    assert index.to_json() == text
    assert decode_index(text.encode(), "x") == index
    assert list(index.dataset("toy").splits) == ["train", "test"]


def test_a_missing_directory_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.*shards build"):
        load_index(tmp_path / "absent")


def test_a_directory_without_index_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json.*shards build"):
        load_index(tmp_path)


def test_a_directory_above_names_the_one_with_the_index(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "index.json").touch()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "demo"))):
        load_index(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000, '{"version": 1'])
def test_text_that_is_not_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match="not valid JSON"):
        load_index(tmp_path)


_SHARD = {"name": "a.tar", "samples": 1, "bytes": 9, "sha256": "0" * 64, "offsets": [0]}
_ENTRY = {"task": "mner", "subtasks": ["entity"], "labels": {"entity": ["a"]}, "splits": {"dev": [_SHARD]}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "version"),
        ({}, "version"),
        ({"version": 2, "datasets": {}}, "version 2"),
        ({"version": "1", "datasets": {}}, "version '1'"),
        ({"version": 1}, "no datasets"),
        ({"version": 1, "datasets": {}}, "no datasets"),
        ({"version": 1, "datasets": {"toy": []}}, r'"toy": .*dictionary'),
        ({"version": 1, "datasets": {"../toy": _ENTRY}}, r'"\.\./toy" cannot name a dataset'),
    ],
)
def test_data_of_another_form(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_index(json.dumps(data).encode(), "here/index.json")


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
        (_set("task", 1), "task: "),
        (_set("subtasks", []), "subtasks must"),
        (_set("labels", {}), "labels must"),
        (_set("labels", {"entity": []}), "labels.entity: "),
        (_set("labels", {"entity": {"types": [1]}}), "labels.entity.types.0: "),
        (_set("reference_f1", {"entity": 0}), "reference_f1.entity: "),
        (_set("reference_f1", {"entity": True}), "reference_f1.entity.*valid number"),
        (_set("reference_f1", {"relation": 50}), "reference_f1 must"),
        (_set("splits", {}), "splits: "),
        (_set("splits", {"valid": []}), "splits.valid: .*train.*dev.*test"),
        (_set("splits.train", []), "splits.train: "),
        (_set("splits.train", [1]), "splits.train.0: "),
        (_set("splits.train.0.name", "/etc/passwd.tar"), "splits.train.0.name: "),
        (_set("splits.train.0.name", "../other/a.tar"), "splits.train.0.name: "),
        (_set("splits.train.0.name", "..tar"), "splits.train.0.name: "),
        (_set("splits.train.0.name", "a\\b.tar"), "splits.train.0.name: "),
        (_set("splits.train.0.name", "index.json"), "splits.train.0.name: "),
        (_set("splits.train.0.samples", 0), "splits.train.0.samples: "),
        (_set("splits.train.0.samples", True), "splits.train.0.samples: "),
        (_set("splits.train.0.bytes", 1.5), "splits.train.0.bytes: "),
        (_set("splits.train.0.sha256", "0"), "splits.train.0.sha256: "),
        (_set("splits.train.0.offsets", [0]), "splits.train.0: offsets must"),
        (_set("splits.train.0.offsets", [0, 5, 5]), "splits.train.0: offsets must"),
        (_set("splits.train.0.offsets", [512, 1024, 2048]), "splits.train.0: offsets must"),
        (_set("splits.train.0.offsets", [0, 512, 10**9]), "splits.train.0: offsets must"),
        (lambda dataset: dataset["splits"]["train"].append(dataset["splits"]["train"][0]), "different shards"),
        (lambda dataset: dataset["splits"]["test"].append(dataset["splits"]["train"][0]), "different shards"),
        (lambda dataset: dataset.update(task="mner\nerror: "), "task must be a name"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    write_toy(tmp_path, max_samples=3)
    data = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    change(data["datasets"]["toy"])
    (tmp_path / "index.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=f'malformed, dataset "toy".*{message}'):
        load_index(tmp_path)


def test_a_missing_shard_is_found_on_loading(tmp_path: Path) -> None:
    write_toy(tmp_path)
    (tmp_path / "toy-test-000000.tar").unlink()
    with pytest.raises(UserError, match=r"toy-test-000000\.tar.*missing"):
        load_index(tmp_path)
    assert list(load_index(tmp_path, check_files=False).dataset_tasks("test")) == ["toy/entity"]


def test_a_truncated_shard_is_found_on_loading(tmp_path: Path) -> None:
    write_toy(tmp_path)
    shard = tmp_path / "toy-train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"toy-train-000000\.tar.* \d+ bytes"):
        load_index(tmp_path)


def test_an_unknown_dataset_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='Did you mean "toy"'):
        write_toy(tmp_path).dataset("toys")


def test_images_are_counted_by_split(tmp_path: Path) -> None:
    index = write_toy(tmp_path, max_samples=3)
    assert index.count_images() == "5 of 9"
    assert index.count_images("test") == "1 of 2"


def test_an_index_of_an_earlier_release_has_an_unknown_number_of_images(tmp_path: Path) -> None:
    write_toy(tmp_path)
    data = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    for shards in data["datasets"]["toy"]["splits"].values():
        for shard in shards:
            del shard["images"]
    index = decode_index(json.dumps(data).encode(), "here/index.json")
    assert index.count_images() == "an unknown number of 9"
