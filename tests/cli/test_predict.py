"""``lvlm-clorae predict`` with a stand-in for the trained model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lvlm_clorae import cli
from lvlm_clorae.inference.adapter_directory import SCHEMA_VERSION
from lvlm_clorae.inference.records import Request


class Extractor:
    """A stand-in for the trained model that records its arguments."""

    asked: tuple[Any, ...] = ()

    @classmethod
    def from_pretrained(cls, path: Path) -> Extractor:
        cls.asked = (path,)
        return cls()

    def extract_all(self, requests: list[Request], **options: Any) -> list[list[Any]]:
        Extractor.asked += (requests, options)
        return [[self] * number for number in range(2, 2 + len(requests))]

    def to_dict(self) -> dict[str, str]:
        return {"text": "Žižkov"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory with an adapter, and the stand-in in place of the extractor."""
    module = ModuleType("lvlm_clorae.inference.extractor")
    module.Extractor = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lvlm_clorae.inference.extractor", module)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    subtasks = {"mner": "entity", "mre": "relation", "mee": "trigger"}
    found = {
        subtask: {"dataset": task, "task": task, "subtask": subtask, "labels": ["person"]}
        for task, subtask in subtasks.items()
    }
    schema = {
        "version": SCHEMA_VERSION,
        "base": "demo",
        "base_fingerprint": {},
        "adapter": "lora",
        "tasks": [*subtasks],
        "dataset_tasks": found,
    }
    schema |= {"max_source_length": 9, "max_target_length": 9}
    (tmp_path / "run" / "adapter" / "schema.json").write_text(json.dumps(schema))
    Extractor.asked = ()
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["predict", *argv]) == 2
    return capsys.readouterr().err


def test_request_of_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run / "image.png"
    image.touch()
    boxes = "[[0, 1, 20, 30.5]]"
    argv = ["--text", "a b", "--image", str(image), "--task", "mee", "--boxes", boxes]
    assert cli.main(["predict", "--run", str(run), *argv]) == 0
    assert capsys.readouterr().out == '{"text": "Žižkov"}\n' * 2
    request = Request("a b", image, "mee", boxes=json.loads(boxes))
    assert Extractor.asked == (run / "adapter", [request], {"constrained": False})
    assert cli.main(["predict", "--run", str(run / "adapter"), "--text", "a", "--constrained"]) == 0
    assert Extractor.asked[0] == run / "adapter"
    assert Extractor.asked[2]["constrained"]


def test_requests_of_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").touch()
    lines = [{"text": "a b", "id": 7}, {"text": "c d", "image": "a.png", "task": "mre", "head": "c", "tail": "d"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    assert cli.main(["predict", "--run", str(run), "--input", str(tmp_path / "in.jsonl"), "--task", "mee"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    record = {"text": "Žižkov"}
    assert found == [{**lines[0], "records": [record] * 2}, {**lines[1], "records": [record] * 3}]
    second = Request("c d", tmp_path / "a.png", "mre", "c", "d", [])
    assert Extractor.asked[1] == [Request("a b", None, "mee", boxes=[]), second]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((), "--input"),
        (("--text", "a", "--task", "mre", "--head", "a"), "--tail"),
        (("--text", "a b", "--task", "mre", "--head", "a", "--tail", "c"), '"c"'),
        (("--image", "/nowhere.png"), "/nowhere.png"),
        (("--text", "a", "--boxes", "1,2,3,4"), "--boxes"),
        (("--text", "a", "--boxes", "[[1, 2, 3]]"), "--boxes"),
        (("--text", "a", "--boxes", "[[5, 2, 3, 4]]"), "--boxes"),
        (("--text", "a", "--boxes", "[1]"), "--boxes"),
        (("--text", "a", "--boxes", "7"), "--boxes"),
        (("--text", "a", "--boxes", "[[1, 2, 3, 4]]"), "image"),
        (("--text", "a", "--objects", "[[1, 2, 3, 4]]"), "--boxes"),
        (("--text", "a", "--task", "mnr"), '"mner"'),
        (("--text", "a", "--image", ""), "empty"),
        (("--input", "in.jsonl", "--text", "a"), "--text"),
        (("--input", "in.jsonl", "--image", "a.png"), "--image"),
        (("--input", "in.jsonl", "--boxes", "[]"), "--boxes"),
        (("--input", "/dev/null"), "has no requests"),
    ],
)
def test_invalid_requests(argv: tuple[str, ...], named: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(capsys, "--run", str(run), *argv)
    assert Extractor.asked == (), "refused before the model is loaded"


def test_directories_without_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict = ("--text", "a", "--run")
    assert str(tmp_path / "none") in refused(capsys, *predict, str(tmp_path / "none"))
    assert "schema.json" in refused(capsys, *predict, str(tmp_path))
    (tmp_path / "config.yaml").touch()
    assert "adapter/" in refused(capsys, *predict, str(tmp_path))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "schema.json").touch()
    assert f"--run {tmp_path / 'best'}" in refused(capsys, *predict, str(tmp_path))
