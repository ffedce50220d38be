"""Conversion of synthetic files in the format of M2E2: splits, pairs and malformed records."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.convert import build
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import format_answer
from tests.helpers.shards import read_split


def _sentence(name: str, text: str, *events: dict[str, Any]) -> dict[str, Any]:
    return {"sentence_id": name, "sentence": text, "words": text.split(), "golden-event-mentions": list(events)}


def _event(event_type: str, trigger: tuple[int, int, str], *arguments: tuple[str, int, int, str]) -> dict[str, Any]:
    return {
        "trigger": dict(zip(("start", "end", "text"), trigger, strict=True)),
        "event_type": event_type,
        "arguments": [dict(zip(("role", "start", "end", "text"), item, strict=True)) for item in arguments],
    }


MEETING = _event("Contact:Meet", (3, 4, "met"), ("Place", 5, 8, "Elm, E.L."), ("Entity", 0, 1, "Maple"))
PAIR_SENTENCE = _sentence("DOC_1.0_1", "Maple and Oak met in Elm , E.L. today", MEETING)
PAIR_IMAGE = {
    "role": {"Entity": [["0", 50, 1, 90, 60], ["1", 5, 6, 40, 60]], "Place": [["1", 5, 6, 40, 60]]},
    "event_type": "Contact:Meet",
}
OTHER_IMAGE = {"role": {"Victim": [["1", 1, 2, 3, 4]]}, "event_type": "Life:Die"}


@pytest.fixture
def news(tmp_path: Path) -> Path:
    folder = tmp_path / "news"
    folder.mkdir()
    texts = [
        _sentence("DOC_1.0_1", "Maple and Oak met in Elm , E.L. today", MEETING),
        _sentence("DOC_2.0_8", "Maple and Oak met in Elm , E.L. today", MEETING),
        *[_sentence(f"DOC_{n}.0_2", f"Nothing happened in town {n}") for n in range(40)],
        *[_sentence(f"DOC_{n}.0_3", "Repeated by every article") for n in range(40)],
    ]
    pairs = {
        "crossmedia_coref.txt": "DOC_1.0_1\tDOC_1.0_0.jpg\tContact:Meet\nDOC_1.0_1\tDOC_1.0_1.jpg\tContact:Meet\n",
        "text_multimedia_event.json": json.dumps([PAIR_SENTENCE]),
        "image_multimedia_event.json": json.dumps({"DOC_1.0_0": PAIR_IMAGE, "DOC_1.0_1": OTHER_IMAGE}),
        "image_only_event.json": json.dumps({f"DOC_{n}.0_0": OTHER_IMAGE for n in range(1, 40)}),
    }
    for name, text in pairs.items():
        (folder / name).write_text(text, encoding="utf-8")
    with zipfile.ZipFile(folder / "m2e2_annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/m2e2_annotations/text_only_event.json", "not this one")
        archive.writestr("m2e2_annotations/text_only_event.json", json.dumps(texts))
    return folder


def test_pairs_are_the_test_split(news: Path, tmp_path: Path) -> None:
    report = build("m2e2", news, None, tmp_path / "out")
    same, differs = read_split(tmp_path / "out", "m2e2", "test")
    assert same["objects"] == [
        {"id": "O1", "box": [5, 6, 40, 60], "label": ""},
        {"id": "O2", "box": [50, 1, 90, 60], "label": ""},
    ]
    assert same["image"] == "DOC_1.0_0.jpg"
    assert format_answer(same, "trigger") == "Contact:Meet, met"
    assert format_answer(same, "argument") == (
        "Contact:Meet <spot> Place, Elm , E.L. <spot> Entity, Maple "
        "<spot> Entity, O2 <spot> Entity, O1 <spot> Place, O1"
    )
    assert same["source"] == {"file": "crossmedia_coref.txt", "line": 1, "sentence": "DOC_1.0_1", "crowds": ["O2"]}
    assert format_answer(differs, "trigger") == "Contact:Meet, met <spot> Life:Die"
    assert differs["events"][1] == {
        "type": "Life:Die",
        "trigger": None,
        "arguments": [{"role": "Victim", "object": "O1"}],
    }
    assert report.notes["pairs whose image shows an event of another type than the sentence"] == 1
    assert verify(tmp_path / "out").ok


def test_splits_share_no_article(news: Path, tmp_path: Path) -> None:
    report = build("m2e2", news, None, tmp_path / "out")
    assert report.notes["sentences left out because they occur in the pairs"] == 2
    assert report.notes["images left out because they occur in the pairs"] == 1
    train, dev = (read_split(tmp_path / "out", "m2e2", split) for split in ("train", "dev"))
    assert len(train) + len(dev) == 80 + 38
    assert 0 < len(dev) < len(train) / 2
    repeated = [split for split in (train, dev) if any(item["text"] == "Repeated by every article" for item in split)]
    assert len(repeated) == 1
    train_articles, dev_articles = (
        {_article(item) for item in split if not item["text"].startswith("Repeated")} for split in (train, dev)
    )
    assert not train_articles & dev_articles
    image_only = next(item for item in train if item["image"])
    assert (image_only["text"], image_only["tokens"]) == ("", [])
    assert image_only["events"][0]["trigger"] is None
    assert all(item["events"] == [] for item in train if item["text"].startswith("Nothing"))


def _article(item: dict[str, Any]) -> str:
    return str(item["source"].get("sentence") or item["image"]).rpartition("_")[0]


def test_file_beside_the_archive_takes_precedence(news: Path, tmp_path: Path) -> None:
    (news / "text_only_event.json").write_text(json.dumps([_sentence("DOC_1.0_5", "Just this")]))
    report = build("m2e2", news, None, tmp_path / "out", limit=1)
    assert report.samples["test"] == 1
    others = read_split(tmp_path / "out", "m2e2", "train") + read_split(tmp_path / "out", "m2e2", "dev")
    assert "Just this" in [item["text"] for item in others]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text_multimedia_event.json", None, r"text_multimedia_event\.json.*m2e2_annotations\.zip"),
        ("text_multimedia_event.json", "{", "text_multimedia_event.json: not valid"),
        ("text_multimedia_event.json", "{}", "text_multimedia_event.json.*list"),
        ("image_only_event.json", "[]", "image_only_event.json.*dict"),
        ("m2e2_annotations.zip", None, "text_only_event.json or m2e2_annotations.zip.*limanling/m2e2"),
        ("m2e2_annotations.zip", "no zip", r"m2e2_annotations\.zip: cannot be unpacked"),
    ],
)
def test_missing_and_malformed_files_raise(
    news: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    (news / name).unlink()
    if content is not None:
        (news / name).write_text(content)
    with pytest.raises(UserError, match=message):
        build("m2e2", news, None, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_zip_bomb_is_refused(news: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm_clorae.data.convert.common.MAX_INPUT_BYTES", 1000)
    with pytest.raises(UserError, match=r"m2e2_annotations\.zip.*text_only_event\.json"):
        build("m2e2", news, None, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("text", {"sentence_id": "x_1", "words": ["a"]}, "golden-event-mentions"),
        ("text", "a string", "string"),
        ("text", _sentence("x_1", "a b", _event("Contact:Meet", (1, 3, "b"))), "2 tokens"),
        (
            "text",
            _sentence("x_1", "a b", _event("Contact:Sing", (1, 2, "b"))),
            'unknown label: argument "Contact:Sing"',
        ),
        ("image", {"role": {"Victim": [["1", 9, 2, 3, 4]]}, "event_type": "Life:Die"}, "objects[0].box"),
        ("image", {"role": {"Victim": [["1", 9, 2, 3]]}, "event_type": "Life:Die"}, "objects[0].box"),
        ("image", {"role": {"Hero": [["1", 1, 2, 3, 4]]}, "event_type": "Life:Die"}, 'unknown label: argument "Hero"'),
        ("image", {"event_type": "Life:Die"}, "role"),
        ("image", [], "list"),
    ],
)
def test_malformed_record_is_rejected(news: Path, tmp_path: Path, name: str, record: Any, reason: str) -> None:
    if name == "text":
        (news / "text_only_event.json").write_text(json.dumps([_sentence("y_1", "Fine"), record]))
    else:
        (news / "image_only_event.json").write_text(json.dumps({"y_1": OTHER_IMAGE, "x_1": record}))
    report = build("m2e2", news, None, tmp_path / "out", max_rejected=0.5)
    assert [(item.file, item.line) for item in report.rejected] == [(f"{name}_only_event.json", 2)]
    assert reason in report.rejected[0].reason


@pytest.mark.parametrize("line", ["only one field", "a\tb", "DOC_9_1\tDOC_1.0_0.jpg\tContact:Meet"])
def test_malformed_pair_is_rejected(news: Path, tmp_path: Path, line: str) -> None:
    with open(news / "crossmedia_coref.txt", "a", encoding="utf-8") as handle:
        handle.write(f"\n{line}\n")
    report = build("m2e2", news, None, tmp_path / "out", max_rejected=0.5)
    assert [(item.file, item.line) for item in report.rejected] == [("crossmedia_coref.txt", 4)]
