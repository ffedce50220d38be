"""Any answer is scored for every sub-task and match, with consistent counts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.tasks import MATCHES, SUBTASKS, Counts, Scored, format_answer, gold_tuples, score_sample
from tests.helpers.task_samples import LABELS, SAMPLES, asked_samples, crowded

ANSWERS = 30_000
_MARKERS = ["<spot>", " <spot> ", "<event>", " <event> ", "<region>"]
_PIECES = [*_MARKERS, ",", ", ", " ", "none", "None", "O1", "O3", "\n", "<"]
_WORDS = ["person", "location", "attack", "meet", "target", "place", "couple", "Jordan", "New York", "Mara", "Kobani"]
_UNICODE = ["\u0000", "\u00a0", "\u3000", "e\u0301", "\u200b", "\u202e", "\ud800", "\U0001f600", "\u0130", "ß", "\x1c"]


def assert_possible(sample: dict[str, Any], answer: str, subtask: str, match: str) -> Scored:
    scored = score_sample(sample, answer, subtask, LABELS[subtask], match)
    assert 0 <= scored.counts.tp <= min(scored.counts.predicted, scored.counts.gold), answer
    assert scored.counts.predicted <= len(scored.tuples)
    assert scored.malformed >= 0
    return scored


def assert_matches_agree(sample: dict[str, Any], answer: str, subtask: str) -> None:
    """Assert the relations between the counts of one answer for the four matches."""
    exact, offset, strict, umie = (assert_possible(sample, answer, subtask, match) for match in MATCHES)
    gold = gold_tuples(sample, subtask)
    assert exact[1:] == offset[1:] == strict[1:] == umie[1:], "parsing does not depend on the match"
    assert exact.counts.gold == len([item for item in gold if subtask != "relation" or item[1] != "None"])
    if subtask == "entity":
        assert offset.counts == Counts(offset.counts.tp, exact.counts.predicted, exact.counts.gold)
        assert offset.counts.tp <= exact.counts.tp, "equal positions have equal text"
    else:
        assert offset == exact
    if subtask in ("trigger", "argument"):
        assert strict.counts == Counts(strict.counts.tp, exact.counts.predicted, exact.counts.gold)
        assert strict.counts.tp <= exact.counts.tp, "equal positions have equal text, equal objects equal boxes"
    else:
        assert strict == offset
    assert umie.counts.predicted == len(umie.tuples)
    assert umie.counts.gold <= len(gold)
    assert umie.counts.tp >= exact.counts.tp or subtask == "argument", "umie requires the exact box"


def noise(rng: random.Random) -> str:
    """Return markers, labels, names and code points in random order."""
    some = [*rng.choices(_PIECES + _WORDS + _UNICODE, k=rng.randrange(12)), chr(rng.randrange(0x110000))]
    return "".join(some)


def truncated(answer: str, rng: random.Random) -> str:
    return answer[rng.randrange(len(answer) + 1) :][: rng.randrange(len(answer) + 1)]


def repeated(answer: str, rng: random.Random) -> str:
    marker = rng.choice([" <spot> ", " <event> "])
    pieces = answer.split(marker)
    return marker.join(rng.choices(pieces, k=rng.randint(1, 3 * len(pieces))))


def relabelled(answer: str, rng: random.Random) -> str:
    return answer.replace(rng.choice(_WORDS), rng.choice(_WORDS))


def unmarked(answer: str, rng: random.Random) -> str:
    return answer.replace(rng.choice(_PIECES), "", rng.randint(1, 3))


def inserted(answer: str, rng: random.Random) -> str:
    position = rng.randrange(len(answer) + 1)
    return answer[:position] + rng.choice(_UNICODE + _PIECES) + answer[position:]


MUTATIONS: list[Callable[[str, random.Random], str]] = [truncated, repeated, relabelled, unmarked, inserted]


@pytest.mark.integration
def test_random_answers() -> None:
    rng = random.Random(0)
    samples = {subtask: [SAMPLES[subtask](), crowded()[subtask]] for subtask in SUBTASKS}
    golden = {subtask: [format_answer(sample, subtask) for sample in samples[subtask]] for subtask in SUBTASKS}
    right = wrong = malformed = 0
    for number in range(ANSWERS):
        subtask, which = SUBTASKS[number % len(SUBTASKS)], rng.randrange(2)
        answer = golden[subtask][which] if rng.random() < 0.8 else noise(rng)
        for mutation in rng.choices(MUTATIONS, k=rng.randrange(3)):
            answer = mutation(answer, rng)
        sample = samples[subtask][which]
        if rng.random() < 0.1:
            assert_matches_agree(sample, answer, subtask)
            continue
        scored = assert_possible(sample, answer, subtask, rng.choice(MATCHES))
        right += scored.counts.tp > 0
        wrong += scored.counts.tp < scored.counts.predicted
        malformed += scored.malformed > 0
    assert min(right, wrong, malformed) > ANSWERS / 10, "all outcomes occur"


@given(asked_samples, st.text())
def test_arbitrary_text(asked: tuple[str, dict[str, Any]], answer: str) -> None:
    subtask, sample = asked
    assert_matches_agree(sample, answer, subtask)


@given(asked_samples, asked_samples, st.data())
def test_mutated_gold_answers(
    asked: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    subtask, sample = asked
    answer = format_answer(sample, subtask)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(answer))] * 2)))
    put = data.draw(st.text(max_size=3) | st.sampled_from([*_PIECES, format_answer(other[1], other[0]), answer]))
    assert_matches_agree(sample, answer[:start] + put + answer[end:], subtask)
    assert_matches_agree(sample, f"{answer} <spot> {answer}", subtask)


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_gold_answer_is_found_by_every_match(subtask: str) -> None:
    for sample in (SAMPLES[subtask](), crowded()[subtask]):
        answer, gold = format_answer(sample, subtask), gold_tuples(sample, subtask)
        for match in MATCHES:
            counts = score_sample(sample, answer, subtask, LABELS[subtask], match).counts
            twice = match == "strict" and len(set(gold)) < len(gold)  # two events with one trigger
            assert counts.tp == counts.predicted == counts.gold or (twice and subtask == "trigger")
            assert counts.gold == len(gold) or (subtask == "relation" and match != "umie")
