"""Conversion of synthetic files in the format of MNRE, with the irregularities of the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.convert import BuildReport, build
from lvlm_clorae.data.convert.common import find_spans
from lvlm_clorae.data.validation import verify
from tests.helpers.shards import read_split


def _relation(**changes: Any) -> dict[str, Any]:
    return {
        "token": ["Ann", "'s", "#", "Elms", "beat", "Oaks", "Oaks"],
        "h": {"name": "Ann", "pos": [0, 1]},
        "t": {"name": "#Elms", "pos": [2, 4]},
        "relation": "/per/org/member_of",
        "img_id": "7.jpg",
    } | changes


def _build_mnre(tmp_path: Path, *lines: str) -> tuple[BuildReport, list[dict[str, Any]]]:
    folder = tmp_path / "mnre"
    folder.mkdir(exist_ok=True)
    for name in ("train", "val", "test"):
        (folder / f"ours_{name}.txt").write_text(f"{_relation(relation='none')}\n", encoding="utf-8")
    (folder / "ours_train.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    report = build("mre_v1", folder, None, tmp_path / "out", max_rejected=0.4)
    return report, read_split(tmp_path / "out", "mre_v1", "train")


def test_version_1(tmp_path: Path) -> None:
    report, (first, second) = _build_mnre(tmp_path, str(_relation()), str(_relation(img_id=815, relation="none")))
    assert report.samples == {"train": 2, "dev": 1, "test": 1}
    assert first["relation"] == {
        "head": {"text": "Ann", "span": [0, 1]},
        "tail": {"text": "# Elms", "span": [2, 4]},
        "label": "/per/org/member_of",
    }
    assert first["source"] == {"file": "ours_train.txt", "line": 1, "t_name": "#Elms"}
    assert (second["image"], second["relation"]["label"]) == ("815.jpg", "none")
    assert verify(tmp_path / "out").ok


def test_wrong_span_moves_to_the_only_occurrence_of_its_name(tmp_path: Path) -> None:
    moved = _relation(t={"name": "#Elms", "pos": [4, 5]})
    kept = _relation(t={"name": "Oaks", "pos": [4, 5]})
    absent = _relation(t={"name": "Pine", "pos": [4, 5]})
    _, found = _build_mnre(tmp_path, str(moved), str(kept), str(absent))
    assert [item["relation"]["tail"]["span"] for item in found] == [[2, 4], [4, 5], [4, 5]]
    assert found[0]["source"] == {"file": "ours_train.txt", "line": 1, "t_name": "#Elms", "t_pos": [4, 5]}


V2_FILES = ("mnre_train.txt", "mnre_val .txt", "mnre_test.txt")


@pytest.mark.parametrize("names", [V2_FILES, ("ours_train.txt", "mnre_val.txt", "ours_test.txt")])
def test_version_2(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_text(f"{_relation(relation='None')}\n{_relation(relation='/per/per/alumi')}\n")
    report = build("mre_v2", tmp_path, None, tmp_path / "out")
    assert report.samples == {"train": 2, "dev": 2, "test": 2}
    found = read_split(tmp_path / "out", "mre_v2", "dev")
    assert [item["relation"]["label"] for item in found] == ["none", "/per/per/alumi"]
    assert found[0]["source"]["file"] == names[1]
    assert verify(tmp_path / "out").ok


def test_version_1_given_as_version_2_is_rejected(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        (tmp_path / f"ours_{name}.txt").write_text(f"{_relation(relation='/per/org/leader')}\n{_relation()}\n")
    report = build("mre_v2", tmp_path, None, tmp_path / "out", max_rejected=0.5)
    assert [item.reason for item in report.rejected] == ['unknown label: relation "/per/org/leader"'] * 3


def test_find_spans() -> None:
    assert find_spans(["New", "New", "Elm"], "NewElm") == [(1, 3)]
    assert find_spans(["a", "a"], "a") == [(0, 1), (1, 2)]
    assert find_spans(["ab", " ", "b"], "abb") == [(0, 3)]
    assert find_spans(["a"], "") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'token': [", "never closed"),
        ("__import__('os').system('true')", "malformed node"),
        ("[1, 2]", "list indices"),
        ("(" * 3000, "too many nested"),
        (str({"token": ["a"]}), "'h'"),
        (str(_relation(h={"name": "Ann", "pos": [0, 9]})), "7 tokens"),
        (str(_relation(h={"name": "Ann", "pos": [1, 1]})), "[1, 1]"),
        (str(_relation(h={"name": "Ann", "pos": [0]})), "not enough values"),
        (str(_relation(relation="/per/per/nemesis")), 'unknown label: relation "/per/per/nemesis"'),
        (str(_relation(img_id=None)), "img_id"),
        (str(_relation(img_id="../7.jpg")), "../7.jpg"),
        (str(_relation(token=["a", 1])), "tokens"),
    ],
)
def test_malformed_relation_is_rejected(tmp_path: Path, line: str, reason: str) -> None:
    report, found = _build_mnre(tmp_path, str(_relation()), line)
    assert len(found) == 1
    assert [(item.file, item.line) for item in report.rejected] == [("ours_train.txt", 2)]
    assert reason in report.rejected[0].reason
