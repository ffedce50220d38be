"""Datasets of the user's own: omitted fields, dataset.json and invalid files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.cli import main as cli
from lvlm_clorae.data.convert import BuildReport, TooManyRejected, build
from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import format_answer
from tests.helpers.shards import files, pil_image, read_split

ENTITY = {"text": "Ann Lee sings", "entities": [{"type": "person", "text": "Ann Lee"}]}
RELATION = {
    "text": "Ann Lee sings in Oak",
    "relation": {"head": {"text": "Ann Lee"}, "tail": {"span": [4, 5]}, "label": "lives_in"},
}
EVENT = {
    "tokens": ["Ann", "met", "Lee"],
    "image": "1.png",
    "objects": [{"box": [1, 2, 3, 4]}, {"box": [5, 6, 7, 8], "label": "table"}],
    "events": [
        {
            "type": "meet",
            "trigger": {"text": "met"},
            "arguments": [{"role": "who", "text": "Ann"}, {"role": "where", "object": "O2"}],
        },
        {"type": "sit", "trigger": None},
    ],
}
OWN = {**ENTITY, "task": "aspects", "relation": {**RELATION["relation"], "tail": {"text": "sings"}}}


def _write(folder: Path, *records: Any, name: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _build(folder: Path, **how: Any) -> BuildReport:
    return build("jsonl", folder, how.pop("images", None), folder / "out", **how)


def test_omitted_fields_are_completed(tmp_path: Path) -> None:
    folder = _write(tmp_path / "people", ENTITY, {"text": "None  here ", "entities": []})
    _write(folder, {"tokens": ["Oak"], "entities": [{"type": "place", "span": [0, 1]}]}, name="valid")
    report = _build(folder)
    assert report.samples == {"train": 2, "dev": 1}
    entry = load_index(folder / "out").dataset("people")
    assert (entry.task, entry.subtasks, entry.labels) == ("mner", ("entity",), {"entity": ["person", "place"]})
    assert entry.reference_f1 == {}
    first, second = read_split(folder / "out", "people", "train")
    assert first["tokens"] == ["Ann", "Lee", "sings"]
    assert first["entities"] == [{"type": "person", "text": "Ann Lee", "span": [0, 2]}]
    assert (first["image"], first["objects"]) == (None, [])
    assert first["source"] == {"file": "train.jsonl", "line": 1}
    assert second["text"] == "None here"
    assert read_split(folder / "out", "people", "dev")[0]["entities"][0]["text"] == "Oak"
    assert verify(folder / "out").ok


def test_relations_events_and_objects(tmp_path: Path) -> None:
    relations = _write(tmp_path / "relations", RELATION)
    _build(relations)
    (found,) = read_split(relations / "out", "relations", "train")
    assert format_answer(found, "relation") == "Ann Lee <spot> lives_in <spot> Oak"
    events = _write(tmp_path / "events", EVENT, {"image": "2.png", "events": []})
    (events / "1.png").write_bytes(pil_image())
    report = _build(events, images=events)
    assert (report.images, report.missing_images) == (1, 1)
    first, second = read_split(events / "out", "events", "train")
    assert format_answer(first, "argument") == "meet <spot> who, Ann <spot> where, O2 <event> sit"
    assert first["objects"] == [
        {"id": "O1", "box": [1, 2, 3, 4], "label": ""},
        {"id": "O2", "box": [5, 6, 7, 8], "label": "table"},
    ]
    assert (second["text"], second["tokens"]) == ("", [])
    assert load_index(events / "out").dataset("events").labels == {
        "trigger": ["meet", "sit"],
        "argument": {"types": ["meet", "sit"], "roles": ["where", "who"]},
    }
    assert verify(events / "out").ok


def test_sample_of_shards_is_a_valid_record(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", EVENT)
    _build(folder)
    (found,) = read_split(folder / "out", "a", "train")
    again = _write(tmp_path / "b", found)
    _build(again, name="a")
    assert read_split(again / "out", "a", "train") == [found]
    assert files(folder / "out") == files(again / "out")


def test_user_defined_task(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", OWN, {**OWN, "entities": []}, ENTITY | {"task": "aspects"})
    report = _build(folder, name="reviews", max_rejected=0.5)
    entry = load_index(folder / "out").dataset("reviews")
    assert (entry.task, entry.subtasks) == ("aspects", ("entity", "relation"))
    assert entry.labels == {"entity": ["person"], "relation": ["lives_in"]}
    assert list(load_index(folder / "out").dataset_tasks("train")) == ["reviews/entity", "reviews/relation"]
    assert ["no relation" in item.reason for item in report.rejected] == [True]
    first, _ = read_split(folder / "out", "reviews", "train")
    assert format_answer(first, "relation") == "Ann Lee <spot> lives_in <spot> sings"
    assert verify(folder / "out").ok


def test_links_layout_and_mentions_that_are_not_verbatim(tmp_path: Path) -> None:
    absent = {"text": "6 June", "verbatim": False}
    record = {
        "task": "document",
        "text": "Date: 5 May",
        "layout": [{"span": [0, 1], "box": [0, 0, 20, 9]}, {"span": [1, 3], "box": [30, 0, 60, 9]}],
        "entities": [{"type": "date", **absent}, {"type": "date", "text": "5 May"}],
        "links": [{"head": {"text": "Date:"}, "label": "answer", "tail": {"span": [1, 3]}}],
    }
    report = _build(_write(tmp_path / "forms", record))
    (found,) = read_split(tmp_path / "forms" / "out", "forms", "train")
    assert found["layout"] == record["layout"]
    assert found["entities"] == [{"type": "date", **absent}, {"type": "date", "text": "5 May", "span": [1, 3]}]
    assert format_answer(found, "link") == "Date: <spot> answer <spot> 5 May"
    entry = load_index(tmp_path / "forms" / "out").dataset("forms")
    assert (entry.subtasks, entry.labels["link"]) == (("entity", "link"), ["answer"])
    assert report.rejected == []


def test_dataset_json_takes_precedence(tmp_path: Path) -> None:
    folder = _write(
        tmp_path / "in",
        {**OWN, "task": "people"},
        ENTITY,
        {"text": "Oak", "entities": [{"type": "place", "text": "Oak"}]},
        name="test",
    )
    settings = {
        "name": "who",
        "task": "people",
        "subtasks": ["entity"],
        "labels": {"entity": ["person", "animal"]},
        "reference_f1": {"entity": 61.5},
    }
    (folder / "dataset.json").write_text(json.dumps(settings))
    report = _build(folder, max_rejected=0.5)
    entry = load_index(folder / "out").dataset("who")
    assert (entry.task, entry.subtasks, entry.labels) == ("people", ("entity",), settings["labels"])
    assert entry.reference_f1 == {"entity": 61.5}
    assert [(item.line, item.reason) for item in report.rejected] == [(3, 'unknown label: entity "place"')]
    assert {item.name for item in (folder / "out").iterdir()} >= {"rejected-who.jsonl", "who-test-000000.tar"}


def test_events_without_roles_have_only_triggers(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", {"text": "they met", "events": [{"type": "meet", "trigger": {"text": "met"}}]})
    _build(folder)
    assert load_index(folder / "out").dataset("in").subtasks == ("trigger",)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ({**ENTITY, "entites": []}, '"entites". Did you mean "entities"?'),
        ({**ENTITY, "task": "mre"}, '"mner"'),
        ({"entities": []}, "text"),
        ({**ENTITY, "text": 3}, "text: "),
        ({**ENTITY, "tokens": "Ann"}, "tokens"),
        ({**ENTITY, "tokens": ["Ann", "Lee"]}, "text: "),
        ({**ENTITY, "image": 7}, "image: "),
        ({**ENTITY, "image": "../1.jpg"}, "../1.jpg"),
        ({**ENTITY, "source": 7}, "source: "),
        ({**ENTITY, "objects": [[1, 2, 3, 4]]}, "objects: "),
        ({**ENTITY, "objects": [{"box": [3, 2, 1, 4]}]}, "objects[0].box"),
        ({**ENTITY, "objects": [{"id": "O2", "box": [1, 2, 3, 4]}, {"box": [1, 2, 3, 4]}]}, "O2"),
        ({**ENTITY, "entities": None}, "entities: "),
        ({"text": "Ann Lee"}, "entities: "),
        ({"text": "Ann met Ann", "entities": [{"type": "person", "text": "Ann"}]}, '"Ann" occurs 2 times'),
        ({"text": "Ann.", "entities": [{"type": "person", "text": "Ann"}]}, 'entities[0]: "Ann" occurs 0 times'),
        ({"text": "Ann", "entities": [{"type": "person", "span": [0, 2]}]}, "[0, 2]"),
        ({"text": "Ann", "entities": [{"type": "person", "span": [0, 1], "text": "An"}]}, "entities[0].text"),
        ({"text": "Ann", "entities": [{"type": "person"}]}, "entities[0].text"),
        ({"text": "Ann", "entities": [{"text": "Ann"}]}, "entities[0].type"),
        ({"text": "Ann", "entities": [{"type": "a, b", "text": "Ann"}]}, "entities[0].type"),
        ({"text": "a \ud800", "entities": []}, "surrogates"),
    ],
)
def test_malformed_record_is_rejected_with_its_line(tmp_path: Path, record: Any, reason: str) -> None:
    folder = _write(tmp_path / "in", ENTITY, record)
    report = _build(folder, max_rejected=0.5)
    assert report.samples == {"train": 1}
    assert [(item.file, item.line) for item in report.rejected] == [("train.jsonl", 2)]
    assert reason in report.rejected[0].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"relation": []}, "relation: "),
        ({"relation": {"label": "a"}}, "relation.head"),
        ({"events": [3]}, "events: "),
        ({"events": [{"type": "meet"}]}, "events[0].trigger"),
        ({"events": [{"type": "meet", "trigger": None, "arguments": [{"role": "a", "object": "O9"}]}]}, "O9"),
    ],
)
def test_malformed_annotation_of_a_user_defined_task_is_rejected(tmp_path: Path, change: Any, reason: str) -> None:
    folder = _write(tmp_path / "in", {**ENTITY, "task": "own"}, {**ENTITY, **change})
    report = _build(folder, max_rejected=0.5)
    assert len(report.rejected) == 1
    assert reason in report.rejected[0].reason


def test_too_many_rejected_records_write_no_shards(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", ENTITY, "broken")
    with pytest.raises(TooManyRejected, match=r"in: 1 of 2.*train\.jsonl, line 2"):
        _build(folder)
    assert list(files(folder / "out")) == ["rejected-in.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lables": {}}, '"lables".*"labels"'),
        ({"name": 3}, '"name"'),
        ({"name": "a b"}, r'"a b".*--name'),
        ({"task": "my task"}, '"task"'),
        ({"task": ""}, '"task"'),
        ({"task": "own", "subtasks": "entity"}, '"subtasks"'),
        ({"task": "own", "subtasks": []}, '"subtasks"'),
        ({"task": "own", "subtasks": ["entities"]}, '"entities".*"entity"'),
        ({"subtasks": ["relation"]}, '"relation".*mner'),
        ({"task": "own", "subtasks": ["relation"]}, "label for relation"),
        ({"task": "mre"}, r"label for relation.*train\.jsonl, line 1: relation"),
        ({"labels": []}, '"labels"'),
        ({"labels": {"entity": "person"}}, r'dataset\.json.*"entity"'),
        ({"labels": {"entity": ["p", "p"]}}, r'dataset\.json.*"entity".*different'),
        ({"labels": {"relation": ["None", "none"]}, "task": "mre"}, r'dataset\.json.*"relation".*different'),
        ({"task": "own", "subtasks": ["entity", "entity"]}, r"dataset\.json"),
        ({"labels": {"entities": ["person"]}}, '"entities"'),
        ({"labels": {"entity": ["a, b"]}}, '"a, b" of entity'),
        ({"reference_f1": {"entity": 0}}, "reference_f1"),
        ({"reference_f1": {"entity": True}}, "reference_f1"),
        ({"reference_f1": {"relation": 3}}, '"relation".*mner'),
    ],
)
def test_malformed_dataset_json_raises(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = _write(tmp_path / "in", ENTITY)
    (folder / "dataset.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as caught:
        _build(folder)
    assert caught.value.exit_code == 2
    assert not (folder / "out").exists()


def test_undetermined_dataset_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        _build(tmp_path / "absent")
    with pytest.raises(UserError, match=r"train\.jsonl, dev\.jsonl, valid\.jsonl, test\.jsonl"):
        _build(tmp_path)
    folder = _write(tmp_path / "in", "broken", {k: v for k, v in OWN.items() if k != "task"})
    with pytest.raises(UserError, match=r"train\.jsonl.*dataset\.json"):
        _build(folder)
    _write(folder, {"text": "a", "entities": []})
    with pytest.raises(UserError, match=r"label for entity.*dataset\.json"):
        _build(folder)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match="dict"):
        _build(folder)


@pytest.mark.parametrize("name", ["valid.jsonl", "validation.jsonl"])
def test_a_file_that_is_not_used_is_an_error(name: str, tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", OWN)
    for other in ("dev.jsonl", name):
        (folder / other).write_text(json.dumps(OWN) + "\n")
    with pytest.raises(UserError, match=rf"{name}: not a file of another split"):
        _build(folder)


def test_build_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path / "in", OWN)
    common = ["shards", "build", "--dataset", "jsonl", "--input", str(folder), "--output_dir", str(tmp_path / "out")]
    assert cli([*common, "--name", "no name"]) == 2
    assert '"no name"' in capsys.readouterr().err
    assert cli([*common, "--boxes", str(folder)]) == 2
    assert ".xml" in capsys.readouterr().err
    assert cli([*common, "--name", "reviews"]) == 0
    assert "reviews: 1 train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "Ann"', "line 1: not valid JSON"),
        ("[]", "line 1: not a JSON object"),
        ("", "there are no records"),
        ('{"text": "Ann", "entites": []}', 'line 1: unknown key "entites". Did you mean "entities"?'),
        ('{"text": "Ann"}', "line 1: the record does not determine the task"),
    ],
)
def test_why_the_task_is_not_known(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        _build(_write(tmp_path / "in", line))
    assert str(tmp_path / "in" / "train.jsonl") in str(caught.value)
    assert "dataset.json" in str(caught.value)


def test_an_annotation_that_no_sub_task_uses_is_counted(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", {**ENTITY, **RELATION, "entities": []}, ENTITY)
    (folder / "dataset.json").write_text('{"task": "mner"}')
    report = _build(folder)
    assert [(note, count) for note, count in report.notes.items() if count and "relation" in note] == [
        ('records with "relation", which no sub-task of the dataset uses', 1)
    ]
    assert "relation" in report.summary()
