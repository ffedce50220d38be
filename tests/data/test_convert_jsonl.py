"""A user's own dataset: what the records may leave out, what dataset.json says, and what is the user's to mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.cli import main as cli
from lvlm_clorae.data.convert import BuildReport, TooManyRejected, build
from lvlm_clorae.data.shards import load_index
from lvlm_clorae.data.verify import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import format_answer

from .helpers import files, picture, read_split

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


def test_what_can_be_told_from_the_rest_may_be_left_out(tmp_path: Path) -> None:
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
    (events / "1.png").write_bytes(picture())
    report = _build(events, images=events)
    assert (report.pictures, report.missing_pictures) == (1, 1)
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


def test_a_sample_of_the_shards_is_a_record(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", EVENT)
    _build(folder)
    (found,) = read_split(folder / "out", "a", "train")
    again = _write(tmp_path / "b", found)
    _build(again, name="a")
    assert read_split(again / "out", "a", "train") == [found]
    assert files(folder / "out") == files(again / "out")


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", OWN, {**OWN, "entities": []}, ENTITY | {"task": "aspects"})
    report = _build(folder, name="reviews", max_rejected=0.5)
    entry = load_index(folder / "out").dataset("reviews")
    assert (entry.task, entry.subtasks) == ("aspects", ("entity", "relation"))
    assert entry.labels == {"entity": ["person"], "relation": ["lives_in"]}
    assert load_index(folder / "out").units("train") == ["reviews/entity", "reviews/relation"]
    assert [item.reason for item in report.rejected] == [
        "relation: is missing, which the sub-tasks entity, relation ask for"
    ]
    first, _ = read_split(folder / "out", "reviews", "train")
    assert format_answer(first, "relation") == "Ann Lee <spot> lives_in <spot> sings"
    assert verify(folder / "out").ok


def test_dataset_json_decides(tmp_path: Path) -> None:
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


def test_a_task_without_roles_asks_for_triggers_only(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", {"text": "they met", "events": [{"type": "meet", "trigger": {"text": "met"}}]})
    _build(folder)
    assert load_index(folder / "out").dataset("in").subtasks == ("trigger",)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ({**ENTITY, "entites": []}, 'unknown key "entites". Did you mean "entities"?'),
        ({**ENTITY, "task": "mre"}, 'its task is not the dataset\'s, which is "mner"'),
        ({"entities": []}, "neither a text nor tokens nor an image"),
        ({**ENTITY, "text": 3}, "text: must be a string"),
        ({**ENTITY, "tokens": "Ann"}, "not a list of strings"),
        ({**ENTITY, "tokens": ["Ann", "Lee"]}, "text: must be the tokens joined by single spaces"),
        ({**ENTITY, "image": 7}, "image: must be a file name or null"),
        ({**ENTITY, "image": "../1.jpg"}, "not a plain file name"),
        ({**ENTITY, "source": 7}, "source: must be an object"),
        ({**ENTITY, "objects": [[1, 2, 3, 4]]}, "objects: must be a list of objects"),
        ({**ENTITY, "objects": [{"box": [3, 2, 1, 4]}]}, "must have x1 < x2"),
        ({**ENTITY, "objects": [{"id": "O2", "box": [1, 2, 3, 4]}, {"box": [1, 2, 3, 4]}]}, "O2 is there twice"),
        ({**ENTITY, "entities": None}, "entities: must be a list of objects"),
        ({"text": "Ann Lee"}, "entities: must be a list, not nothing"),
        ({"text": "Ann met Ann", "entities": [{"type": "person", "text": "Ann"}]}, '"Ann" stands 2 times'),
        ({"text": "Ann.", "entities": [{"type": "person", "text": "Ann"}]}, 'entities[0]: "Ann" stands 0 times'),
        ({"text": "Ann", "entities": [{"type": "person", "span": [0, 2]}]}, "outside the 1 tokens"),
        ({"text": "Ann", "entities": [{"type": "person", "span": [0, 1], "text": "An"}]}, "the text is not that"),
        ({"text": "Ann", "entities": [{"type": "person"}]}, "entities[0].text: must be a string"),
        ({"text": "Ann", "entities": [{"text": "Ann"}]}, "entities[0].type: must be a name"),
        ({"text": "Ann", "entities": [{"type": "a, b", "text": "Ann"}]}, "without commas"),
        ({"text": "a \ud800", "entities": []}, "surrogates not allowed"),
    ],
)
def test_a_malformed_record_is_rejected_with_its_line(tmp_path: Path, record: Any, reason: str) -> None:
    folder = _write(tmp_path / "in", ENTITY, record)
    report = _build(folder, max_rejected=0.5)
    assert report.samples == {"train": 1}
    assert [(item.file, item.line) for item in report.rejected] == [("train.jsonl", 2)]
    assert reason in report.rejected[0].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"relation": []}, "relation: must be an object"),
        ({"relation": {"label": "a"}}, "relation.head: must be an object with text and span"),
        ({"events": [3]}, "events: must be a list of objects"),
        ({"events": [{"type": "meet"}]}, "events[0].trigger: is missing"),
        ({"events": [{"type": "meet", "trigger": None, "arguments": [{"role": "a", "object": "O9"}]}]}, "O9"),
    ],
)
def test_a_malformed_annotation_of_an_own_task_is_rejected(tmp_path: Path, change: Any, reason: str) -> None:
    folder = _write(tmp_path / "in", {**ENTITY, "task": "own"}, {**ENTITY, **change})
    report = _build(folder, max_rejected=0.5)
    assert len(report.rejected) == 1
    assert reason in report.rejected[0].reason


def test_too_many_rejected_leave_only_their_list(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", ENTITY, "broken")
    with pytest.raises(TooManyRejected, match=r"in: 1 of 2 records.*train\.jsonl, line 2"):
        _build(folder)
    assert list(files(folder / "out")) == ["rejected-in.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lables": {}}, 'unknown setting "lables". Did you mean "labels"?'),
        ({"name": 3}, '"name" must be a name'),
        ({"name": "a b"}, r'"a b" cannot name a dataset.*--name'),
        ({"task": "my task"}, '"task" must be mner, mre, mee, or a name'),
        ({"task": ""}, '"task" must be'),
        ({"task": "own", "subtasks": "entity"}, '"subtasks" must be a list'),
        ({"task": "own", "subtasks": []}, '"subtasks" must be a list'),
        ({"task": "own", "subtasks": ["entities"]}, '"entities" is no sub-task of own. Did you mean "entity"'),
        ({"subtasks": ["relation"]}, '"relation" is no sub-task of mner'),
        ({"task": "own", "subtasks": ["relation"]}, "no record has a label for relation"),
        ({"task": "mre"}, "no record has a label for relation.*First record at fault: train.jsonl, line 1: relation"),
        ({"labels": []}, '"labels" must be an object'),
        ({"labels": {"entity": "person"}}, 'labels of "entity" must be a list'),
        ({"labels": {"entities": ["person"]}}, 'no sub-task "entities"'),
        ({"labels": {"entity": ["a, b"]}}, 'the label "a, b" of entity has a comma'),
        ({"reference_f1": {"entity": 0}}, "percents above 0"),
        ({"reference_f1": {"entity": True}}, "percents above 0"),
        ({"reference_f1": {"relation": 3}}, '"relation" is no sub-task of mner'),
    ],
)
def test_a_dataset_json_of_another_form(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = _write(tmp_path / "in", ENTITY)
    (folder / "dataset.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as caught:
        _build(folder)
    assert caught.value.exit_code == 2
    assert not (folder / "out").exists()


def test_what_leaves_the_dataset_open(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such directory\. Give the one"):
        _build(tmp_path / "absent")
    with pytest.raises(UserError, match=r"none of train\.jsonl, dev\.jsonl, valid\.jsonl, test\.jsonl"):
        _build(tmp_path)
    folder = _write(tmp_path / "in", "broken", {k: v for k, v in OWN.items() if k != "task"})
    with pytest.raises(UserError, match=r"train\.jsonl: the first record leaves the dataset's task open"):
        _build(folder)
    _write(folder, {"text": "a", "entities": []})
    with pytest.raises(UserError, match=r"no record has a label for entity.*dataset\.json"):
        _build(folder)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match="a JSON dict is expected"):
        _build(folder)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path / "in", OWN)
    common = ["shards", "build", "--dataset", "jsonl", "--input", str(folder), "--output", str(tmp_path / "out")]
    assert cli([*common, "--name", "no name"]) == 2
    assert "cannot name a dataset" in capsys.readouterr().err
    assert cli([*common, "--boxes", str(folder)]) == 2
    assert "no .xml file in it" in capsys.readouterr().err
    assert cli([*common, "--name", "reviews"]) == 0
    assert "reviews: 1 train" in capsys.readouterr().out
