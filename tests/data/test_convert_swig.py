"""Conversion of synthetic files in the format of SWiG: verbs that are events, and their boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.convert import BuildReport, build
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import format_answer, gold_tuples, ground, parse_answer
from tests.helpers.shards import files, pil_image, read_split

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


def _image(verb: str = "arresting", **changes: Any) -> dict[str, Any]:
    frames = [
        {"agent": "n1", "suspect": "n2", "tool": "n3", "place": ""},
        {"agent": "n1", "suspect": "n1", "tool": "n3", "place": ""},
        {"agent": "n2", "suspect": "n9", "tool": "n1", "place": "n2"},
    ]
    boxes = {"agent": [10, 5, 19, 9], "suspect": [1, 2, 8, 9], "tool": [0, 0, 3, 3], "place": ABSENT}
    return {"verb": verb, "height": 10, "width": 20, "bb": boxes, "frames": frames} | changes


def _build(folder: Path, pil_images: dict[str, Any], **how: Any) -> BuildReport:
    (folder / "ace_sr_mapping.txt").write_text(MAPPING, encoding="utf-8")
    for split in ("train", "dev", "test"):
        (folder / f"{split}.json").write_text(json.dumps({"arresting_1.jpg": _image()}), encoding="utf-8")
    (folder / "train.json").write_text(json.dumps(pil_images), encoding="utf-8")
    return build("swig", folder, how.pop("images", None), folder / how.pop("out", "out"), **how)


def test_swig(tmp_path: Path) -> None:
    (tmp_path / "imsitu_space.json").write_text(json.dumps(SPACE))
    (tmp_path / "arresting_7.jpg").write_bytes(pil_image(size=(20, 10)))
    pil_images = {"arresting_7.jpg": _image(), "sneezing_1.jpg": _image("sneezing"), "arresting_8.jpg": _image()}
    report = _build(tmp_path, pil_images, images=tmp_path)
    assert report.samples == {"train": 2, "dev": 1, "test": 1}
    assert (report.images, report.missing_images, report.rejected) == (1, 3, [])
    assert report.notes["images left out because their verb is no ACE event"] == 1
    first, second = read_split(tmp_path / "out", "swig", "train")
    assert first["objects"] == [
        {"id": "O1", "box": [0, 0, 3, 3], "label": ""},  # two of three use n3, which has no gloss
        {"id": "O2", "box": [1, 2, 8, 9], "label": ""},  # no majority
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


def test_without_glosses_objects_have_no_label(tmp_path: Path) -> None:
    _build(tmp_path, {"arresting_1.jpg": _image()})
    _build(tmp_path, {"arresting_1.jpg": _image()}, out="again")
    (found,) = read_split(tmp_path / "out", "swig", "train")
    assert {item["label"] for item in found["objects"]} == {""}
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_invisible_roles_and_shared_boxes(tmp_path: Path) -> None:
    (tmp_path / "imsitu_space.json").write_text(json.dumps(SPACE))
    shared = {"agent": [1, 2, 8, 9], "suspect": [1, 2, 8, 9], "place": ABSENT, "tool": ABSENT}
    nothing = dict.fromkeys(shared, ABSENT)
    frames = [{"agent": "n2", "payment": "n1"}] * 3
    money = {"agent": ABSENT, "payment": [1, 2, 3, 4]}
    _build(
        tmp_path,
        {
            "a_1.jpg": _image(bb=shared),
            "a_2.jpg": _image(bb=nothing),
            "b_1.jpg": _image("buying", bb=money, frames=frames),
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
        ("x_1.jpg", [], "list"),
        ("x_1.jpg", {"height": 3}, "verb"),
        ("x_1.jpg", _image(verb=["arresting"]), "unhashable"),
        ("x_1.jpg", {"verb": "arresting"}, "bb"),
        ("x_1.jpg", _image(bb={"agent": [3, 2, 1, 5]}), "objects[0].box"),
        ("x_1.jpg", _image(bb={"agent": [1, 2, 5]}), "objects[0].box"),
        ("x_1.jpg", _image(bb={"agent": [1, 2, 5, "6"]}), "objects[0].box"),
        ("x_1.jpg", _image(bb={"agent": [1, 2, 5, 6], "tool": ["a", 1, 2, 3]}), "not supported between"),
        ("x_1.jpg", _image(bb={"agent": 3}), "not iterable"),
        ("x_1.jpg", _image(bb=[]), "no attribute"),
        ("x_1.jpg", _image(frames=[]), "not enough values"),
        ("x_1.jpg", _image(frames=[{}]), "tool"),
        ("../x_1.jpg", _image(), "../x_1.jpg"),
    ],
)
def test_malformed_image_is_rejected(tmp_path: Path, name: str, record: Any, reason: str) -> None:
    report = _build(tmp_path, {"arresting_1.jpg": _image(), name: record}, max_rejected=0.5)
    assert [(item.file, item.line) for item in report.rejected] == [("train.json", 2)]
    assert reason in report.rejected[0].reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", None, r"train\.json.*allenai/swig"),
        ("train.json", "[]", r"train\.json.*dict"),
        ("train.json", '{"a": ', r"train\.json"),
        ("ace_sr_mapping.txt", None, r"ace_sr_mapping\.txt.*limanling/m2e2"),
        ("ace_sr_mapping.txt", f"{MAPPING}\n\narresting agent", "line 6"),
        ("ace_sr_mapping.txt", "a\tb\tLife||Sing\tAgent", 'line 1: "Life||Sing"'),
        ("ace_sr_mapping.txt", f"{MAPPING}\nbuying\tx\tLife||Die\tAgent", 'line 5: "buying".*Transaction:Transfer'),
        ("imsitu_space.json", "{}", r"imsitu_space\.json"),
        ("imsitu_space.json", '{"nouns": {"n1": {}}}', r"imsitu_space\.json"),
    ],
)
def test_missing_and_malformed_files_raise(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    _build(tmp_path, {"arresting_1.jpg": _image()})
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message.replace("||", r"\|\|")):
        build("swig", tmp_path, None, tmp_path / "other")
    assert not (tmp_path / "other").exists()
