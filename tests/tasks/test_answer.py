from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import (
    SUBTASKS,
    format_answer,
    gold_tuples,
    ground,
    parse_answer,
    parse_with_errors,
)
from lvlm_clorae.tasks.answer import written_tuples
from tests.helpers.task_samples import ANSWERS, LABELS, SAMPLES, asked_samples, mee, mner, mre

_asked_text = st.tuples(
    st.sampled_from(SUBTASKS),
    st.text()
    | st.lists(
        st.sampled_from(
            ["<spot>", "<event>", ",", " ", "none", "person", "attack", "couple", "target", "O1", "x", "\n"]
        )
    ).map("".join),
)


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_format_of_each_subtask(subtask: str) -> None:
    assert format_answer(SAMPLES[subtask](), subtask) == ANSWERS[subtask]


def test_tuples_of_each_subtask() -> None:
    assert {subtask: parse_answer(ANSWERS[subtask], subtask, LABELS[subtask]) for subtask in SUBTASKS} == {
        "entity": [("person", "Kyrie"), ("location", "Dallas")],
        "relation": [("Ryan Reynolds", "couple", "Blake Lively")],
        "trigger": [("attack", "airstrike"), ("meet", "")],
        "argument": [("attack", "attacker", "coalition"), ("attack", "target", "O1")],
        "link": [("Date:", "answer", "5 May"), ("To:", "answer", "Mara")],
    }


@pytest.mark.parametrize("subtask", SUBTASKS)
@pytest.mark.parametrize("annotation", [{}, {"entities": [], "relation": None, "events": []}])
def test_empty_annotation_is_none(subtask: str, annotation: dict[str, Any]) -> None:
    assert format_answer({"text": "a", **annotation}, subtask) == "none"
    for answer in ("none", "None", " NONE\n"):
        assert parse_with_errors(answer, subtask, LABELS[subtask]) == ([], 0)


@given(asked_samples)
def test_format_then_parse_is_the_identity(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    parsed, malformed = parse_with_errors(format_answer(sample, subtask), subtask, LABELS[subtask])
    assert parsed == written_tuples(sample, subtask)
    assert malformed == 0
    grounded = ground(parsed, sample) if subtask == "argument" else parsed
    assert grounded == gold_tuples(sample, subtask)


def test_text_argument_equal_to_an_object_id_is_split() -> None:
    sample = mee()
    sample["events"] = [
        {"type": "attack", "trigger": None, "arguments": [_text("O1"), _text("O9"), {"role": "target", "object": "O1"}]}
    ]
    assert format_answer(sample, "argument") == "attack <spot> target, O 1 <spot> target, O9 <spot> target, O1"
    fillers = [filler for _, _, filler in gold_tuples(sample, "argument")]
    assert fillers == ["O 1", "O9", (0.0, 0.0, 10.0, 10.0)]


def test_event_without_arguments_has_no_tuple() -> None:
    answer = "meet <event> attack <spot> target, O1 <event> meet"
    assert parse_with_errors(answer, "argument", LABELS["argument"]) == ([("attack", "target", "O1")], 0)


def test_relation_none_is_a_triple() -> None:
    answer = format_answer(mre("None"), "relation")
    assert answer == "Ryan Reynolds <spot> None <spot> Blake Lively"
    assert parse_answer(answer, "relation", LABELS["relation"]) == [("Ryan Reynolds", "None", "Blake Lively")]


def test_markers_without_spaces() -> None:
    assert parse_answer("person,Kyrie<spot>location,Dallas", "entity", LABELS["entity"]) == gold_tuples(
        mner(), "entity"
    )
    answer = "attack<spot>attacker, coalition<spot>target,O1<event>meet"
    assert parse_answer(answer, "argument", LABELS["argument"]) == written_tuples(mee(), "argument")


def test_labels_match_case_insensitively() -> None:
    assert parse_answer("PERSON, Kyrie", "entity", LABELS["entity"]) == [("person", "Kyrie")]
    assert parse_answer("a <spot> none <spot> b", "relation", LABELS["relation"]) == [("a", "None", "b")]
    assert parse_answer("conflict:attack, war", "trigger", LABELS["trigger"]) == [("Conflict:Attack", "war")]
    assert parse_answer("a, x <spot> A, y", "entity", ["A", "a"]) == [("a", "x"), ("A", "y")]


@pytest.mark.parametrize(
    ("subtask", "answer", "kept", "malformed"),
    [
        ("entity", "", [], 1),
        ("entity", "person", [], 1),
        ("entity", "person,", [], 1),
        ("entity", "animal, Kyrie <spot> person, Kyrie", [("person", "Kyrie")], 1),
        ("entity", "person, Kyrie <spot>", [("person", "Kyrie")], 1),
        ("entity", "person, Kyrie <spot> none <spot> person, Kyrie", [("person", "Kyrie")] * 2, 1),
        ("entity", "person, none", [("person", "none")], 0),
        ("relation", "couple", [], 1),
        ("relation", "a <spot> couple", [], 2),
        ("relation", "a <spot> couple <spot> ", [], 3),
        ("relation", "a <spot> friends <spot> b", [], 3),
        ("relation", "a <spot> couple <spot> b <spot> c", [], 4),
        ("trigger", "attack", [("attack", "")], 0),
        ("trigger", "attack,", [], 1),
        ("trigger", "war, airstrike <spot> meet", [("meet", "")], 1),
        ("argument", "war <spot> target, x <event> meet <spot> place, y", [("meet", "place", "y")], 2),
        ("argument", "meet <spot> where, y <spot> place <spot> place, y", [("meet", "place", "y")], 2),
        ("argument", "attack, airstrike <spot> target, x", [], 2),
        ("argument", "none <event> meet", [], 1),
        ("link", "a <spot> answer <event> b <spot> answer <spot> c", [("b", "answer", "c")], 2),
        ("link", "a <spot> gift <spot> b <event> none", [], 4),
    ],
)
def test_malformed_pieces_are_dropped(subtask: str, answer: str, kept: Any, malformed: int) -> None:
    assert parse_with_errors(answer, subtask, LABELS[subtask]) == (kept, malformed)


@given(_asked_text)
def test_parser_never_raises(asked: tuple[str, str]) -> None:
    _assert_well_formed(*asked)


@given(asked_samples, st.data())
@example(("entity", mner()), None)
def test_parser_never_raises_on_a_mutated_answer(asked: tuple[str, dict[str, Any]], data: Any) -> None:
    subtask, sample = asked
    answer = format_answer(sample, subtask)
    if data is not None:
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(answer))] * 2)))
        put = data.draw(st.text(max_size=3) | st.sampled_from([" <spot> ", " <event> ", "none", ", ", answer]))
        answer = answer[:start] + put + answer[end:]
    _assert_well_formed(subtask, answer)


def test_unknown_subtask_and_malformed_labels_raise() -> None:
    for call in (
        lambda: format_answer(mner(), "ner"),
        lambda: parse_answer("none", "ner", []),
        lambda: parse_answer("none", "entity", "person"),
    ):
        with pytest.raises(UserError):
            call()


def _assert_well_formed(subtask: str, answer: str) -> None:
    """Assert that tuples have known labels and text without markers, and that each piece is kept or counted."""
    parsed, malformed = parse_with_errors(answer, subtask, LABELS[subtask])
    assert parse_answer(answer, subtask, LABELS[subtask]) == parsed
    pieces = answer.replace("<event>", "<spot>").count("<spot>") + 1
    assert 0 <= malformed <= pieces
    for item in parsed:
        if subtask == "argument":
            labels, texts = item[:2], item[2:]
            assert labels[0] in LABELS["argument"]["types"]
            assert labels[1] in LABELS["argument"]["roles"]
        elif subtask in ("relation", "link"):
            assert item[1] in LABELS[subtask]
            texts = item[::2]
        else:
            assert item[0] in LABELS[subtask]
            texts = item[1:]
        assert all((text or subtask == "trigger") and "<spot>" not in text for text in texts)


def _text(text: str) -> dict[str, Any]:
    return {"role": "target", "text": text, "span": [0, 1]}


def test_an_answer_that_is_no_text_is_an_error() -> None:
    with pytest.raises(TypeError, match="str, not NoneType"):
        parse_answer(None, "entity", ["person"])  # type: ignore[arg-type]
