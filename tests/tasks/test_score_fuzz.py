"""Whatever an answer is, it is scored: in every sub-task and way to match, and the counts are possible ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.tasks import MATCHES, SUBTASKS, Counts, Scored, format_answer, gold_tuples, score_sample

from .samples import LABELS, SAMPLES, asked_samples, crowded

ANSWERS = 100_000
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


def assert_ways_agree(sample: dict[str, Any], answer: str, subtask: str) -> None:
    """What must hold between the counts of one answer in the three ways."""
    exact, offset, umie = (assert_possible(sample, answer, subtask, match) for match in MATCHES)
    gold = gold_tuples(sample, subtask)
    assert exact[1:] == offset[1:] == umie[1:], "what is read does not depend on how it is matched"
    assert exact.counts.gold == len([item for item in gold if subtask != "relation" or item[1] != "None"])
    if subtask == "entity":
        assert offset.counts == Counts(offset.counts.tp, exact.counts.predicted, exact.counts.gold)
        assert offset.counts.tp <= exact.counts.tp, "what is at one place has one text"
    else:
        assert offset == exact
    assert umie.counts.predicted == len(umie.tuples)
    assert umie.counts.gold <= len(gold)
    assert umie.counts.tp >= exact.counts.tp or subtask == "argument", "umie asks for the very box"


def noise(chance: random.Random) -> str:
    """Markers, labels and names in any order, with some of any code points."""
    some = [*chance.choices(_PIECES + _WORDS + _UNICODE, k=chance.randrange(12)), chr(chance.randrange(0x110000))]
    return "".join(some)


def truncated(answer: str, chance: random.Random) -> str:
    return answer[chance.randrange(len(answer) + 1) :][: chance.randrange(len(answer) + 1)]


def repeated(answer: str, chance: random.Random) -> str:
    marker = chance.choice([" <spot> ", " <event> "])
    pieces = answer.split(marker)
    return marker.join(chance.choices(pieces, k=chance.randint(1, 3 * len(pieces))))


def relabelled(answer: str, chance: random.Random) -> str:
    return answer.replace(chance.choice(_WORDS), chance.choice(_WORDS))


def unmarked(answer: str, chance: random.Random) -> str:
    return answer.replace(chance.choice(_PIECES), "", chance.randint(1, 3))


def inserted(answer: str, chance: random.Random) -> str:
    place = chance.randrange(len(answer) + 1)
    return answer[:place] + chance.choice(_UNICODE + _PIECES) + answer[place:]


MUTATIONS: list[Callable[[str, random.Random], str]] = [truncated, repeated, relabelled, unmarked, inserted]


def test_a_hundred_thousand_answers() -> None:
    chance = random.Random(0)
    samples = {subtask: [SAMPLES[subtask](), crowded()[subtask]] for subtask in SUBTASKS}
    golden = {subtask: [format_answer(sample, subtask) for sample in samples[subtask]] for subtask in SUBTASKS}
    right = wrong = malformed = 0
    for number in range(ANSWERS):
        subtask, which = SUBTASKS[number % len(SUBTASKS)], chance.randrange(2)
        answer = golden[subtask][which] if chance.random() < 0.8 else noise(chance)
        for mutation in chance.choices(MUTATIONS, k=chance.randrange(3)):
            answer = mutation(answer, chance)
        sample = samples[subtask][which]
        if chance.random() < 0.1:
            assert_ways_agree(sample, answer, subtask)
            continue
        scored = assert_possible(sample, answer, subtask, chance.choice(MATCHES))
        right += scored.counts.tp > 0
        wrong += scored.counts.tp < scored.counts.predicted
        malformed += scored.malformed > 0
    assert min(right, wrong, malformed) > ANSWERS / 10, "there is some of everything"


@given(asked_samples, st.text())
def test_any_text(asked: tuple[str, dict[str, Any]], answer: str) -> None:
    subtask, sample = asked
    assert_ways_agree(sample, answer, subtask)


@given(asked_samples, asked_samples, st.data())
def test_any_mutation_of_any_gold(
    asked: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    subtask, sample = asked
    answer = format_answer(sample, subtask)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(answer))] * 2)))
    put = data.draw(st.text(max_size=3) | st.sampled_from([*_PIECES, format_answer(other[1], other[0]), answer]))
    assert_ways_agree(sample, answer[:start] + put + answer[end:], subtask)
    assert_ways_agree(sample, f"{answer} <spot> {answer}", subtask)


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_gold_is_found_in_every_way(subtask: str) -> None:
    for sample in (SAMPLES[subtask](), crowded()[subtask]):
        answer, gold = format_answer(sample, subtask), gold_tuples(sample, subtask)
        for match in MATCHES:
            counts = score_sample(sample, answer, subtask, LABELS[subtask], match).counts
            assert counts.tp == counts.predicted == counts.gold
            assert counts.gold == len(gold) or (subtask == "relation" and match != "umie")
