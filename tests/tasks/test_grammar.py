"""The grammar of answers: gold is in it, and what is in it parses and says words of the sample alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import SUBTASKS, format_answer, parse_with_errors
from lvlm_clorae.tasks.grammar import DONE, START, Grammar, answer_grammar, without_dead_ends

from .samples import ANSWERS, LABELS, SAMPLES, asked_samples, assert_founded, mee, mner, mre

NOTHING: dict[str, Any] = {"text": "", "objects": []}


def is_in(grammar: Grammar, answer: str) -> bool:
    """Whether there is a way through the grammar whose pieces make up the answer."""
    reached, fresh = set(), {(START, 0)}
    while fresh:
        reached |= fresh
        fresh = {
            (target, offset + len(piece))
            for state, offset in fresh
            for piece, targets in grammar[state]
            for target in targets
            if answer.startswith(piece, offset)
        } - reached
    return (DONE, len(answer)) in reached


def walk(grammar: Grammar, rng: random.Random) -> str:
    """A random answer of the grammar."""
    state, answer = START, ""
    while state != DONE:
        piece, targets = rng.choice(grammar[state])
        state, answer = rng.choice(targets), answer + piece
    return answer


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_umies_strings_are_in_it(subtask: str) -> None:
    assert is_in(answer_grammar(SAMPLES[subtask](), subtask, LABELS[subtask]), ANSWERS[subtask])


@given(asked_samples)
def test_gold_is_in_it(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    assert is_in(answer_grammar(sample, subtask, LABELS[subtask]), format_answer(sample, subtask))


@given(asked_samples, st.integers(0, 1 << 32))
def test_what_is_in_it_parses_and_says_what_the_sample_has(asked: tuple[str, dict[str, Any]], seed: int) -> None:
    subtask, sample = asked
    assert_founded(sample, subtask, walk(answer_grammar(sample, subtask, LABELS[subtask]), random.Random(seed)))


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
def test_what_is_in_it(subtask: str, answer: str, inside: bool) -> None:
    assert is_in(answer_grammar(SAMPLES[subtask](), subtask, LABELS[subtask]), answer) is inside


def test_a_word_that_reads_like_an_object_may_be_either() -> None:
    sample = {**mee(), "text": "coalition hit O1 hard"}
    grammar = answer_grammar(sample, "argument", LABELS["argument"])
    for filler in ("O1", "O 1", "hit O1", "O1 hard", "O2"):
        assert is_in(grammar, f"attack <spot> target, {filler}"), filler
    for filler in ("O 1 hard", "hit O 1", "O 2"):
        assert not is_in(grammar, f"attack <spot> target, {filler}"), filler


@pytest.mark.parametrize(
    ("subtask", "sample", "answers"),
    [
        ("entity", NOTHING, {"none"}),
        ("trigger", NOTHING, {"none", "attack", "meet <spot> attack"}),
        ("argument", NOTHING, {"none", "attack", "meet <event> attack"}),
        ("argument", {**mee(), "text": ""}, {"none", "attack", "attack <spot> target, O2 <event> meet"}),
        ("relation", NOTHING, {"none"}),
        ("entity", {}, {"none"}),
        ("relation", {}, {"none"}),
    ],
)
def test_samples_without_a_text_have_answers_still(subtask: str, sample: dict[str, Any], answers: set[str]) -> None:
    grammar = answer_grammar(sample, subtask, LABELS[subtask])
    assert all(is_in(grammar, answer) for answer in answers)
    for seed in range(20):
        assert parse_with_errors(walk(grammar, random.Random(seed)), subtask, LABELS[subtask]).malformed == 0
    if len(answers) == 1:
        assert {walk(grammar, random.Random(seed)) for seed in range(20)} == answers


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_without_labels_there_is_nothing_to_say(subtask: str) -> None:
    none: Any = {"types": [], "roles": []} if subtask == "argument" else []
    assert walk(answer_grammar(SAMPLES[subtask](), subtask, none), random.Random(0)) == "none"


def test_pieces_can_be_left_out() -> None:
    grammar = answer_grammar(mner(), "entity", LABELS["entity"])
    without = without_dead_ends(grammar, {" leaves", "none"})
    assert is_in(without, "person, Kyrie <spot> location, Dallas .")
    assert not is_in(without, "person, Kyrie leaves Dallas")
    assert not is_in(without, "none")
    assert START not in without_dead_ends(answer_grammar(mre(), "relation", LABELS["relation"]), {"Ryan Reynolds"})


def test_unknown_subtasks_and_labels_are_the_users_error() -> None:
    with pytest.raises(UserError, match='no sub-task "ner"'):
        answer_grammar(mner(), "ner", [])
    with pytest.raises(UserError, match="must be a list of names"):
        answer_grammar(mner(), "entity", "person")
