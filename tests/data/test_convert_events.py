"""Conversion of synthetic ACE 2005 sentences in the two forms that are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.convert import BuildReport, build
from lvlm_clorae.data.convert.events import ACE_TYPES, normalize_label
from lvlm_clorae.data.convert.swig import TYPES as M2E2_TYPES
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import format_answer
from tests.helpers.shards import files, read_split

TOKENS = ["Maple", "shelled", "Oak", "on", "Monday"]


def _oneie(**changes: Any) -> dict[str, Any]:
    entities = [
        {"id": "DOC-E1-1", "text": "Maple", "entity_type": "ORG", "mention_type": "NAM", "start": 0, "end": 1},
        {"id": "DOC-E2-2", "text": "Oak", "entity_type": "GPE", "mention_type": "NAM", "start": 2, "end": 3},
    ]
    event = {
        "id": "DOC-EV1-1",
        "event_type": "Conflict:Attack",
        "trigger": {"text": "shelled", "start": 1, "end": 2},
        "arguments": [
            {"entity_id": "DOC-E1-1", "text": "Maple", "role": "Attacker"},
            {"entity_id": "DOC-E2-2", "text": "Oak", "role": "Target"},
        ],
    }
    return {
        "doc_id": "DOC",
        "sent_id": "DOC-1",
        "tokens": TOKENS,
        "sentence": "Maple shelled Oak on Monday",
        "entity_mentions": entities,
        "relation_mentions": [],
        "event_mentions": [event],
    } | changes


def _jmee(**changes: Any) -> dict[str, Any]:
    event = {
        "event_type": "Conflict:Attack",
        "trigger": {"text": "shelled", "start": 1, "end": 2},
        "arguments": [
            {"role": "Attacker", "entity-type": "ORG:Government", "text": "Maple", "start": 0, "end": 1},
            {"role": "Target", "entity-type": "GPE:Nation", "text": "Oak", "start": 2, "end": 3},
            {"role": "Time-Within", "entity-type": "TIM:time", "text": "Monday", "start": 4, "end": 5},
        ],
    }
    sentence = "Maple shelled Oak on Monday"
    return {"sentence": sentence, "words": TOKENS, "golden-event-mentions": [event], "lemma": []} | changes


def _build(folder: Path, *records: Any, max_rejected: float = 0.0) -> BuildReport:
    """Build shards of records in OneIE's form, with the file names of its versions."""
    for name in ("train.oneie.json", "dev.w1.oneie.json", "test.oneie.json"):
        (folder / name).write_text(json.dumps(_oneie()) + "\n", encoding="utf-8")
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "train.oneie.json").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return build("ace2005", folder, None, folder / "out", max_rejected=max_rejected)


def test_oneie(tmp_path: Path) -> None:
    quiet = _oneie(event_mentions=[], sent_id="DOC-2")
    whole = _oneie()
    whole["wnd_id"] = whole.pop("sent_id")
    report = _build(tmp_path, _oneie(), quiet, whole)
    assert report.samples == {"train": 3, "dev": 1, "test": 1}
    first, second, third = read_split(tmp_path / "out", "ace2005", "train")
    assert format_answer(first, "trigger") == "Conflict:Attack, shelled"
    assert format_answer(first, "argument") == "Conflict:Attack <spot> Attacker, Maple <spot> Target, Oak"
    assert (first["image"], first["objects"]) == (None, [])
    assert first["source"] == {"file": "train.oneie.json", "line": 1, "sentence": "DOC-1"}
    assert (second["events"], third["source"]["sentence"]) == ([], "DOC-1")
    assert verify(tmp_path / "out").ok


def test_jmee(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps([_jmee(), _jmee()], indent=1), encoding="utf-8")
    report = build("ace2005", tmp_path, None, tmp_path / "out", limit=1)
    build("ace2005", tmp_path, None, tmp_path / "again", limit=1)
    assert report.samples == {"train": 1, "dev": 1, "test": 1}
    (found,) = read_split(tmp_path / "out", "ace2005", "dev")
    assert format_answer(found, "argument") == (
        "Conflict:Attack <spot> Attacker, Maple <spot> Target, Oak <spot> Time-Within, Monday"
    )
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_mention_that_differs_from_its_span_is_counted(tmp_path: Path) -> None:
    record = _oneie()
    record["entity_mentions"][0]["text"] = "M aple"
    report = _build(tmp_path, record)
    assert report.notes["mentions that differ from their span in spaces only; the span is kept"] == 1
    assert read_split(tmp_path / "out", "ace2005", "train")[0]["events"][0]["arguments"][0]["text"] == "Maple"


@pytest.mark.parametrize(
    "name", ["Conflict.Attack", "CONFLICT:ATTACK", "Conflict||Attack", "conflict_attack", "Conflict:Attack"]
)
def test_event_types_have_the_spelling_of_m2e2(tmp_path: Path, name: str) -> None:
    record = _oneie()
    record["event_mentions"][0]["event_type"] = name
    _build(tmp_path, record)
    assert read_split(tmp_path / "out", "ace2005", "train")[0]["events"][0]["type"] == "Conflict:Attack"


def test_labels_stay_distinct_without_separators() -> None:
    assert [normalize_label(name.replace("-", "").upper(), ACE_TYPES) for name in ACE_TYPES] == ACE_TYPES
    assert normalize_label("Transaction||Transfer|MONEY", M2E2_TYPES) == "Transaction:Transfer-Money"
    assert normalize_label("Sing", M2E2_TYPES) == "Sing"
    assert normalize_label(3, M2E2_TYPES) == 3


def _without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "Expecting property name"),
        ("3", "int"),
        ("null", "NoneType"),
        ('"tokens words"', "string indices"),
        ("{}", "OneIE"),
        ("[" * 100_000, "nested too deeply"),
        (_without(_oneie(), "event_mentions"), "event_mentions"),
        (_without(_oneie(), "sent_id"), "wnd_id"),
        (_oneie(entity_mentions=[]), "DOC-E1-1"),
        (_oneie(tokens=TOKENS[:2]), "2 tokens"),
        (_oneie(tokens="Maple"), "tokens"),
        (_oneie(event_mentions=[{"event_type": "Attack"}]), "arguments"),
        (_jmee(words=None), "tokens"),
    ],
)
def test_malformed_sentence_is_rejected(tmp_path: Path, record: Any, reason: str) -> None:
    report = _build(tmp_path, _oneie(), record, max_rejected=0.5)
    assert [(item.file, item.line) for item in report.rejected] == [("train.oneie.json", 2)]
    assert reason in report.rejected[0].reason


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("event_type", "Conflict:Sing", 'unknown label: argument "Conflict:Sing"; unknown label: trigger'),
        ("event_type", None, "events[0].type"),
        ("trigger", {"text": "a", "start": 1, "end": 1}, "[1, 1]"),
        ("trigger", None, "not subscriptable"),
        ("arguments", [{"entity_id": "DOC-E1-1", "role": "Singer"}], 'unknown label: argument "Singer"'),
        ("arguments", [{"entity_id": ["DOC"], "role": "Target"}], "unhashable"),
    ],
)
def test_malformed_event_is_rejected(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    record = _oneie()
    record["event_mentions"][0][key] = value
    report = _build(tmp_path, _oneie(), record, max_rejected=0.5)
    assert [(item.file, item.line) for item in report.rejected] == [("train.oneie.json", 2)]
    assert reason in report.rejected[0].reason


def test_missing_and_malformed_files_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.oneie\.json or train\.w1\.oneie\.json or train\.json.*LDC2006T06"):
        build("ace2005", tmp_path, None, tmp_path / "out")
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.json").write_text("[{")
    with pytest.raises(UserError, match=r"train\.json"):
        build("ace2005", tmp_path, None, tmp_path / "out")
