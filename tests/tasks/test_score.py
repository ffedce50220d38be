from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import (
    MATCHES,
    SUBTASKS,
    Counts,
    Scored,
    format_answer,
    gold_tuples,
    ground,
    score,
    score_sample,
)
from tests.helpers.task_samples import ANSWERS, BOXES, LABELS, SAMPLES, asked_samples, crowded, mee, mner, mre

_COUNTS = st.builds(Counts, *[st.integers(0, 9)] * 3)


def test_precision_recall_and_f1_are_percentages() -> None:
    counts = Counts(tp=1, predicted=2, gold=4)
    assert (counts.precision, counts.recall) == (50.0, 25.0)
    assert counts.f1 == pytest.approx(2 * 50 * 25 / 75)
    with pytest.raises(dataclasses.FrozenInstanceError):
        counts.tp = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("counts", "precision", "recall"), [((0, 0, 0), 0, 0), ((0, 0, 3), 0, 0), ((0, 3, 0), 0, 0), ((7, 7, 7), 100, 100)]
)
def test_scores_without_predictions_or_gold_tuples(
    counts: tuple[int, int, int], precision: float, recall: float
) -> None:
    assert (Counts(*counts).precision, Counts(*counts).recall) == (precision, recall)
    assert Counts(*counts).f1 == precision


@given(st.lists(_COUNTS))
def test_sum_of_counts(parts: list[Counts]) -> None:
    total = sum(parts, Counts())
    assert total == Counts(sum(c.tp for c in parts), sum(c.predicted for c in parts), sum(c.gold for c in parts))


def test_gold_tuples() -> None:
    assert {subtask: gold_tuples(SAMPLES[subtask](), subtask) for subtask in SUBTASKS} == {
        "entity": [("person", "Kyrie"), ("location", "Dallas")],
        "relation": [("Ryan Reynolds", "couple", "Blake Lively")],
        "trigger": [("attack", "airstrike"), ("meet", "")],
        "argument": [("attack", "attacker", "coalition"), ("attack", "target", BOXES["O1"])],
        "link": [("Date:", "answer", "5 May"), ("To:", "answer", "Mara")],
    }


@pytest.mark.parametrize("subtask", ["entity", "trigger"])
@given(data=st.data())
def test_text_tuples_match_as_multisets(subtask: str, data: st.DataObject) -> None:
    pairs = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["x", "y", ""])), max_size=6)
    gold, predicted = data.draw(pairs), data.draw(pairs)
    counted, guessed = Counter(gold), Counter(predicted)
    both = sum(min(counted[item], guessed[item]) for item in counted)
    assert score(gold, predicted, subtask) == Counts(both, len(predicted), len(gold))


def test_duplicate_tuples_count_separately() -> None:
    one = ("person", "Kyrie")
    assert score([one], [one, one], "entity") == Counts(1, 2, 1)
    assert score([one, one], [one], "entity") == Counts(1, 1, 2)
    assert score([one, one], [one, one], "entity") == Counts(2, 2, 2)


@pytest.mark.parametrize("none", ["none", "None", "NONE"])
def test_relation_none_is_not_counted(none: str) -> None:
    nothing, couple = ("a", none, "b"), ("a", "couple", "b")
    assert score([nothing], [nothing], "relation") == Counts(0, 0, 0)
    assert score([couple], [nothing], "relation") == Counts(0, 0, 1)
    assert score([nothing], [couple], "relation") == Counts(0, 1, 0)
    assert score([couple], [couple], "relation") == Counts(1, 1, 1)


def test_entity_named_none_is_counted() -> None:
    assert score([("person", "none")], [("person", "none")], "entity") == Counts(1, 1, 1)


@pytest.mark.parametrize(
    ("filler", "right"),
    [
        ((0.0, 0.0, 10.0, 10.0), 1),
        ((0.0, 0.0, 10.0, 6.0), 1),
        ((0.0, 0.0, 10.0, 5.0), 0),
        ("O1", 0),
    ],
)
def test_visual_argument_matches_by_overlap(filler: Any, right: int) -> None:
    gold = [("attack", "target", BOXES["O1"])]
    assert score(gold, [("attack", "target", filler)], "argument") == Counts(right, 1, 1)
    assert score(gold, [("attack", "place", filler)], "argument").tp == 0
    assert score(gold, [("meet", "target", filler)], "argument").tp == 0


def test_boxes_and_texts_of_the_same_role() -> None:
    gold = [("attack", "target", BOXES["O1"]), ("attack", "target", "tank"), ("attack", "target", BOXES["O1"])]
    predicted = [("attack", "target", "tank"), ("attack", "target", "tank"), ("attack", "target", BOXES["O1"])]
    assert score(gold, predicted, "argument") == Counts(2, 3, 3)


def test_ground_keeps_unknown_ids() -> None:
    tuples = [("attack", "target", "O2"), ("attack", "target", "O7"), ("attack", "target", "o2")]
    assert ground(tuples, mee()) == [("attack", "target", BOXES["O2"]), *tuples[1:]]


@given(asked_samples)
def test_gold_answer_scores_exactly_100(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    counts, predicted, malformed = score_sample(sample, format_answer(sample, subtask), subtask, LABELS[subtask])
    gold = gold_tuples(sample, subtask)
    assert predicted == gold
    assert malformed == 0
    assert counts.tp == counts.predicted == counts.gold
    assert counts.gold == sum(subtask != "relation" or item[1] != "None" for item in gold)
    assert counts.f1 == (100.0 if counts.gold else 0.0)


def test_score_sample_returns_grounded_tuples() -> None:
    scored = score_sample(mee(), "attack <spot> target, O2", "argument", LABELS["argument"])
    assert scored.tuples == [("attack", "target", BOXES["O2"])]
    assert scored.counts == Counts(0, 1, 2)
    assert score_sample(mee(), ANSWERS["argument"], "argument", LABELS["argument"]).counts == Counts(2, 2, 2)
    assert score_sample(mre(), "none", "relation", LABELS["relation"]) == Scored(Counts(0, 0, 1), [], 0)


@pytest.mark.parametrize("match", MATCHES)
def test_malformed_pieces_are_counted_and_not_predicted(match: str) -> None:
    answer = "person, Kyrie <spot> animal, Kyrie <spot> location"
    expected = Scored(Counts(1, 1, 2), [("person", "Kyrie")], 2)
    assert score_sample(mner(), answer, "entity", LABELS["entity"], match) == expected


@given(*[st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy")), max_size=6)] * 2)
def test_umie_counts_equal_the_released_code(gold: list[Any], predicted: list[Any]) -> None:
    """In the released code, a prediction removes its gold tuple, but misses are searched in all predictions."""
    left, hits = list(gold), 0
    for item in predicted:
        if item in left:
            left.remove(item)
            hits += 1
    missed = len([item for item in gold if item not in predicted])
    counts = score(gold, predicted, "entity", "umie")
    assert (counts.tp, counts.predicted, counts.gold) == (hits, len(predicted), hits + missed)
    assert (counts.tp, counts.predicted) == (score(gold, predicted, "entity").tp, len(predicted))


def test_umie_counts_differ_from_exact_counts() -> None:
    one, nothing = ("person", "Kyrie"), ("a", "none", "b")
    assert score([one, one], [one], "entity", "umie").f1 == 100.0
    assert score([one, one], [one, one, one], "entity", "umie") == Counts(2, 3, 2)
    assert score([nothing], [nothing], "relation", "umie") == Counts(1, 1, 1)
    assert score([nothing], [("a", "couple", "b")], "relation", "umie") == Counts(0, 1, 1)
    box, near = BOXES["O1"], (0.0, 0.0, 10.0, 9.0)
    assert score([("meet", "place", box)], [("meet", "place", near)], "argument") == Counts(1, 1, 1)
    assert score([("meet", "place", box)], [("meet", "place", near)], "argument", "umie") == Counts(0, 1, 1)
    assert score([("meet", "place", box)], [("meet", "place", box)], "argument", "umie") == Counts(1, 1, 1)


@pytest.mark.parametrize("subtask", ["relation", "trigger", "argument"])
def test_offset_match_equals_exact_match_except_for_entities(subtask: str) -> None:
    for sample in (SAMPLES[subtask](), crowded()[subtask]):
        for answer in (ANSWERS[subtask], format_answer(sample, subtask)):
            exact, offset = (score_sample(sample, answer, subtask, LABELS[subtask], m) for m in ("exact", "offset"))
            assert exact == offset


def test_unknown_subtask_raises() -> None:
    for call in (lambda: score([], [], "arguments"), lambda: gold_tuples(mee(), "arguments")):
        with pytest.raises(UserError, match="argument"):
            call()


def test_unknown_match_raises() -> None:
    for call in (
        lambda: score([], [], "entity", "ofset"),
        lambda: score_sample(mner(), "none", "entity", LABELS["entity"], "ofset"),
    ):
        with pytest.raises(UserError, match=r'"ofset".*"offset"'):
            call()
