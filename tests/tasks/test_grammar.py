"""The answer grammar accepts gold answers, and accepted answers parse and consist of words of the sample."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import SUBTASKS, format_answer, parse_with_errors
from lvlm_clorae.tasks.grammar import DONE, START, Grammar, answer_grammar, without_dead_ends
from tests.helpers.task_samples import ANSWERS, LABELS, SAMPLES, asked_samples, assert_grounded, mee, mner, mre

EMPTY: dict[str, Any] = {"text": "", "objects": []}


def accepts(grammar: Grammar, answer: str) -> bool:
    """Return whether the grammar accepts the answer."""
    reached, frontier = set(), {(START, 0)}
    while frontier:
        reached |= frontier
        frontier = {
            (target, offset + len(piece))
            for state, offset in frontier
            for piece, targets in grammar[state]
            for target in targets
            if answer.startswith(piece, offset)
        } - reached
    return (DONE, len(answer)) in reached


def walk(grammar: Grammar, rng: random.Random) -> str:
    """Return a random answer of the grammar."""
    state, answer = START, ""
    while state != DONE:
        piece, targets = rng.choice(grammar[state])
        state, answer = rng.choice(targets), answer + piece
    return answer


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_accepts_the_answer_of_each_subtask(subtask: str) -> None:
    assert accepts(answer_grammar(SAMPLES[subtask](), subtask, LABELS[subtask]), ANSWERS[subtask])


@given(asked_samples)
def test_accepts_gold_answers(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    assert accepts(answer_grammar(sample, subtask, LABELS[subtask]), format_answer(sample, subtask))


@given(asked_samples, st.integers(0, 1 << 32))
def test_accepted_answers_are_well_formed_and_grounded(asked: tuple[str, dict[str, Any]], seed: int) -> None:
    subtask, sample = asked
    assert_grounded(sample, subtask, walk(answer_grammar(sample, subtask, LABELS[subtask]), random.Random(seed)))


@pytest.mark.parametrize(
    ("subtask", "answer", "inside"),
    [
        ("entity", "none", True),
        ("entity", "person, Kyrie leaves Dallas .", True),
        ("entity", "person, Kyrie <spot> person, Kyrie", True),
        ("entity", "person, Kyrie Dallas", False),
        ("entity", "person, Kyri", False),
        ("entity", "person, Sven", False),
        ("entity", "animal, Kyrie", False),
        ("entity", "Person, Kyrie", False),
        ("entity", "person", False),
        ("entity", "person,", False),
        ("entity", "person, Kyrie <spot>", False),
        ("entity", "none <spot> person, Kyrie", False),
        ("entity", "", False),
        ("relation", "Ryan Reynolds <spot> None <spot> Blake Lively", True),
        ("relation", "Blake Lively <spot> couple <spot> Ryan Reynolds", False),
        ("relation", "Ryan <spot> couple <spot> Blake Lively", False),
        ("relation", "none", False),
        ("trigger", "attack <spot> attack, airstrike", True),
        ("trigger", "attack, O1", False),
        ("argument", "meet", True),
        ("argument", "attack <spot> target, O2 <spot> place, coalition launched <event> attack", True),
        ("argument", "attack <spot> target, O3", False),
        ("argument", "attack <spot> target, O1 airstrike", False),
        ("argument", "attack, airstrike", False),
        ("argument", "attack <spot> target", False),
        ("argument", "target, O1", False),
        ("argument", "none <event> attack", False),
    ],
)
def test_accepted_and_rejected_answers(subtask: str, answer: str, inside: bool) -> None:
    assert accepts(answer_grammar(SAMPLES[subtask](), subtask, LABELS[subtask]), answer) is inside


def test_word_equal_to_an_object_id_is_ambiguous() -> None:
    sample = {**mee(), "text": "coalition hit O1 hard"}
    grammar = answer_grammar(sample, "argument", LABELS["argument"])
    for filler in ("O1", "O 1", "hit O1", "O1 hard", "O2"):
        assert accepts(grammar, f"attack <spot> target, {filler}"), filler
    for filler in ("O 1 hard", "hit O 1", "O 2"):
        assert not accepts(grammar, f"attack <spot> target, {filler}"), filler


@pytest.mark.parametrize(
    ("subtask", "sample", "answers"),
    [
        ("entity", EMPTY, {"none"}),
        ("trigger", EMPTY, {"none", "attack", "meet <spot> attack"}),
        ("argument", EMPTY, {"none", "attack", "meet <event> attack"}),
        ("argument", {**mee(), "text": ""}, {"none", "attack", "attack <spot> target, O2 <event> meet"}),
        ("relation", EMPTY, {"none"}),
        ("entity", {}, {"none"}),
        ("relation", {}, {"none"}),
    ],
)
def test_samples_without_text(subtask: str, sample: dict[str, Any], answers: set[str]) -> None:
    grammar = answer_grammar(sample, subtask, LABELS[subtask])
    assert all(accepts(grammar, answer) for answer in answers)
    for seed in range(20):
        assert parse_with_errors(walk(grammar, random.Random(seed)), subtask, LABELS[subtask]).malformed == 0
    if len(answers) == 1:
        assert {walk(grammar, random.Random(seed)) for seed in range(20)} == answers


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_without_labels_the_only_answer_is_none(subtask: str) -> None:
    none: Any = {"types": [], "roles": []} if subtask == "argument" else []
    assert walk(answer_grammar(SAMPLES[subtask](), subtask, none), random.Random(0)) == "none"


def test_without_dead_ends_removes_pieces() -> None:
    grammar = answer_grammar(mner(), "entity", LABELS["entity"])
    without = without_dead_ends(grammar, {" leaves", "none"})
    assert accepts(without, "person, Kyrie <spot> location, Dallas .")
    assert not accepts(without, "person, Kyrie leaves Dallas")
    assert not accepts(without, "none")
    assert START not in without_dead_ends(answer_grammar(mre(), "relation", LABELS["relation"]), {"Ryan Reynolds"})


def test_unknown_subtask_and_malformed_labels_raise() -> None:
    with pytest.raises(UserError, match='"ner"'):
        answer_grammar(mner(), "ner", [])
    with pytest.raises(UserError, match="entity"):
        answer_grammar(mner(), "entity", "person")
