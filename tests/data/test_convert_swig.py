"""SWiG files, invented here in the published format: verbs that are events, and what their boxes become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.convert import BuildReport, build
from lvlm_clorae.data.verify import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import format_answer, gold_tuples, ground, parse_answer

from .helpers import files, picture, read_split

MAPPING = (
    "arresting\tagent\tJustice||Arrest|Jail\tAgent\n"
    "arresting\tsuspect\tJustice||Arrest|Jail\tPerson\n"
    "buying\tagent\tTransaction||Transfer|Money\tGiver\n"
    "buying\tpayment\tTransaction||Transfer|MONEY\tInstrument"
)
SPACE = {
    "nouns": {
        "n1": {"gloss": ["officer", "policeman"], "def": ""},
        "n2": {"gloss": ["man"], "def": ""},
        "n3": {"gloss": [], "def": ""},
    },
    "verbs": {},
}
ABSENT = [-1, -1, -1, -1]


def _picture(verb: str = "arresting", **changes: Any) -> dict[str, Any]:
    frames = [
        {"agent": "n1", "suspect": "n2", "tool": "n3", "place": ""},
        {"agent": "n1", "suspect": "n1", "tool": "n3", "place": ""},
        {"agent": "n2", "suspect": "n9", "tool": "n1", "place": "n2"},
    ]
    boxes = {"agent": [10, 5, 19, 9], "suspect": [1, 2, 8, 9], "tool": [0, 0, 3, 3], "place": ABSENT}
    return {"verb": verb, "height": 10, "width": 20, "bb": boxes, "frames": frames} | changes


def _build(folder: Path, pictures: dict[str, Any], **how: Any) -> BuildReport:
    (folder / "ace_sr_mapping.txt").write_text(MAPPING, encoding="utf-8")
    for split in ("train", "dev", "test"):
        (folder / f"{split}.json").write_text(json.dumps({"arresting_1.jpg": _picture()}), encoding="utf-8")
    (folder / "train.json").write_text(json.dumps(pictures), encoding="utf-8")
    return build("swig", folder, how.pop("images", None), folder / how.pop("out", "out"), **how)


def test_swig(tmp_path: Path) -> None:
    (tmp_path / "imsitu_space.json").write_text(json.dumps(SPACE))
    (tmp_path / "arresting_7.jpg").write_bytes(picture(size=(20, 10)))
    pictures = {"arresting_7.jpg": _picture(), "sneezing_1.jpg": _picture("sneezing"), "arresting_8.jpg": _picture()}
    report = _build(tmp_path, pictures, images=tmp_path)
    assert report.samples == {"train": 2, "dev": 1, "test": 1}
    assert (report.pictures, report.missing_pictures, report.rejected) == (1, 3, [])
    assert report.notes["pictures left out, for their verb is no ACE event"] == 1
    first, second = read_split(tmp_path / "out", "swig", "train")
    assert first["objects"] == [
        {"id": "O1", "box": [0, 0, 3, 3], "label": ""},  # two of three say n3, which has no word
        {"id": "O2", "box": [1, 2, 8, 9], "label": ""},  # no two agree
        {"id": "O3", "box": [10, 5, 19, 9], "label": "officer"},
    ]
    assert (first["text"], first["tokens"], first["events"][0]["trigger"]) == ("", [], None)
    assert format_answer(first, "trigger") == "Justice:Arrest-Jail"
    answer = format_answer(first, "argument")
    assert answer == "Justice:Arrest-Jail <spot> Agent, O3 <spot> Person, O2"
    labels = {"types": ["Justice:Arrest-Jail"], "roles": ["Agent", "Person"]}
    assert ground(parse_answer(answer, "argument", labels), first) == gold_tuples(first, "argument")
    assert first["source"] == {"file": "train.json", "line": 1, "verb": "arresting"}
    assert second["source"]["line"] == 3
    assert verify(tmp_path / "out").ok


def test_without_words_objects_have_no_label(tmp_path: Path) -> None:
    _build(tmp_path, {"arresting_1.jpg": _picture()})
    _build(tmp_path, {"arresting_1.jpg": _picture()}, out="again")
    (found,) = read_split(tmp_path / "out", "swig", "train")
    assert {item["label"] for item in found["objects"]} == {""}
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_roles_without_a_box_are_no_arguments_and_a_box_of_two_roles_is_one_object(tmp_path: Path) -> None:
    (tmp_path / "imsitu_space.json").write_text(json.dumps(SPACE))
    shared = {"agent": [1, 2, 8, 9], "suspect": [1, 2, 8, 9], "place": ABSENT, "tool": ABSENT}
    nothing = dict.fromkeys(shared, ABSENT)
    frames = [{"agent": "n2", "payment": "n1"}] * 3
    money = {"agent": ABSENT, "payment": [1, 2, 3, 4]}
    _build(
        tmp_path,
        {
            "a_1.jpg": _picture(bb=shared),
            "a_2.jpg": _picture(bb=nothing),
            "b_1.jpg": _picture("buying", bb=money, frames=frames),
        },
    )
    first, second, third = read_split(tmp_path / "out", "swig", "train")
    assert first["objects"] == [{"id": "O1", "box": [1, 2, 8, 9], "label": "officer"}]
    assert format_answer(first, "argument") == "Justice:Arrest-Jail <spot> Agent, O1 <spot> Person, O1"
    assert (second["objects"], format_answer(second, "argument")) == ([], "Justice:Arrest-Jail")
    assert format_answer(third, "argument") == "Transaction:Transfer-Money <spot> Instrument, O1"


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("x_1.jpg", [], "list indices"),
        ("x_1.jpg", {"height": 3}, "'verb' is missing"),
        ("x_1.jpg", _picture(verb=["arresting"]), "unhashable"),
        ("x_1.jpg", {"verb": "arresting"}, "'bb' is missing"),
        ("x_1.jpg", _picture(bb={"agent": [3, 2, 1, 5]}), "must have x1 < x2"),
        ("x_1.jpg", _picture(bb={"agent": [1, 2, 5]}), "must be four finite numbers"),
        ("x_1.jpg", _picture(bb={"agent": [1, 2, 5, "6"]}), "must be four finite numbers"),
        ("x_1.jpg", _picture(bb={"agent": [1, 2, 5, 6], "tool": ["a", 1, 2, 3]}), "not supported between"),
        ("x_1.jpg", _picture(bb={"agent": 3}), "not iterable"),
        ("x_1.jpg", _picture(bb=[]), "no attribute"),
        ("x_1.jpg", _picture(frames=[]), "not enough values"),
        ("x_1.jpg", _picture(frames=[{}]), "'tool' is missing"),
        ("../x_1.jpg", _picture(), "not a plain file name"),
    ],
)
def test_a_malformed_picture_is_rejected(tmp_path: Path, name: str, record: Any, reason: str) -> None:
    report = _build(tmp_path, {"arresting_1.jpg": _picture(), name: record}, max_rejected=0.5)
    assert [(item.file, item.line) for item in report.rejected] == [("train.json", 2)]
    assert reason in report.rejected[0].reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", None, r"no train\.json in it.*allenai/swig"),
        ("train.json", "[]", "a JSON dict is expected"),
        ("train.json", '{"a": ', "not valid JSON"),
        ("ace_sr_mapping.txt", None, r"no ace_sr_mapping\.txt in it.*limanling/m2e2"),
        ("ace_sr_mapping.txt", f"{MAPPING}\n\narresting agent", r"line 6: not a verb, a role, an event and a role"),
        ("ace_sr_mapping.txt", "a\tb\tLife||Sing\tAgent", 'line 1: "Life||Sing", "Agent" is no event type and role'),
        ("ace_sr_mapping.txt", f"{MAPPING}\nbuying\tx\tLife||Die\tAgent", 'line 5: "buying" is Transaction:Transfer'),
        ("imsitu_space.json", "{}", "not in the published format"),
        ("imsitu_space.json", '{"nouns": {"n1": {}}}', "not in the published format"),
    ],
)
def test_files_that_are_not_as_published(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    _build(tmp_path, {"arresting_1.jpg": _picture()})
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message.replace("||", r"\|\|")):
        build("swig", tmp_path, None, tmp_path / "other")
    assert not (tmp_path / "other").exists()
