from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import MISSED, SPURIOUS, SUBTASKS, confusion, format_answer, gold_tuples, score, score_sample
from lvlm_clorae.tasks.matching import Box, iou, match_boxes, pair
from tests.helpers.task_samples import BOXES, LABELS, asked_samples, crowded, mee

_side = st.integers(0, 4)
_boxes = st.lists(
    st.tuples(_side, _side, _side, _side).map(
        lambda b: (float(b[0]), float(b[1]), b[0] + b[2] + 3.0, b[1] + b[3] + 3.0)
    ),
    max_size=4,
)


def count_pairs(gold: list[Box], predicted: list[Box]) -> int:
    """Return the number of pairs, after checking that each box is in one pair and that its boxes overlap."""
    pairs = match_boxes(gold, predicted)
    assert len({g for g, _ in pairs}) == len({p for _, p in pairs}) == len(pairs)
    assert all(iou(gold[g], predicted[p]) > 0.5 for g, p in pairs)
    return len(pairs)


def test_iou() -> None:
    box = (0.0, 0.0, 4.0, 2.0)
    assert iou(box, box) == 1.0
    assert iou(box, (2.0, 0.0, 6.0, 2.0)) == pytest.approx(1 / 3)
    assert iou(box, (4.0, 0.0, 6.0, 2.0)) == 0.0
    assert iou(box, (0.0, 3.0, 4.0, 5.0)) == 0.0
    assert iou(box, (10.0, 10.0, 11.0, 11.0)) == 0.0
    assert iou((1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0)) == 0.0
    assert iou((0.0, 0.0, 1e300, 1e300), (0.0, 0.0, 1e300, 1e300)) != 1.0  # overflows to nan, and never raises


@given(_boxes, _boxes)
def test_iou_is_symmetric(a: list[Box], b: list[Box]) -> None:
    for one, other in zip(a, b, strict=False):
        assert iou(one, other) == iou(other, one)


def test_threshold_is_exclusive() -> None:
    assert count_pairs([(0.0, 0.0, 2.0, 2.0)], [(0.0, 0.0, 2.0, 1.0)]) == 0
    assert count_pairs([(0.0, 0.0, 2.0, 2.0)], [(0.0, 0.0, 2.0, 1.1)]) == 1


def test_each_box_is_used_once() -> None:
    box = (0.0, 0.0, 2.0, 2.0)
    assert count_pairs([box], [box, box]) == 1
    assert count_pairs([box, box], [box]) == 1
    assert count_pairs([box] * 3, [box] * 2) == 2
    assert count_pairs([], [box]) == count_pairs([box], []) == 0


@pytest.mark.parametrize("turned", [False, True])
def test_match_that_greedy_matching_loses(turned: bool) -> None:
    left, middle, right = (0.0, 0.0, 10.0, 1.0), (2.0, 0.0, 12.0, 1.0), (4.0, 0.0, 14.0, 1.0)
    gold, predicted = [middle, left], [middle, right]  # middle fits both, right fits middle only
    assert count_pairs(gold, predicted[::-1] if turned else predicted) == 2


def test_long_augmenting_path() -> None:
    box = (0.0, 0.0, 2.0, 2.0)
    chain = [(4.0 * n, 0.0, 4.0 * n + 10, 1.0) for n in range(150)]  # a shifted box overlaps two of them
    shifted = [(x1 + 2.0, y1, x2 + 2.0, y2) for x1, y1, x2, y2 in chain]
    assert count_pairs(chain, shifted) == 150
    assert count_pairs(shifted, chain[::-1]) == 150
    assert count_pairs([box] * 40, [box] * 40) == 40


@settings(max_examples=300)
@given(_boxes, _boxes)
def test_matching_is_maximum(gold: list[Box], predicted: list[Box]) -> None:
    few, many = sorted((gold, predicted), key=len)
    best = max(sum(iou(a, b) > 0.5 for a, b in zip(few, order, strict=True)) for order in permutations(many, len(few)))
    assert count_pairs(gold, predicted) == best


_triples = st.lists(st.tuples(*[st.sampled_from("ab")] * 3), max_size=6)


@pytest.mark.parametrize("ignored", [None, 0, 1])
@given(gold=_triples, predicted=_triples)
def test_equal_tuples_pair_as_multisets_in_order(ignored: int | None, gold: list[Any], predicted: list[Any]) -> None:
    def rest(item: tuple[str, ...]) -> tuple[str, ...]:
        return item if ignored is None else (*item[:ignored], *item[ignored + 1 :])

    pairs = pair(gold, predicted, ignored)
    expected = Counter(map(rest, gold)) & Counter(map(rest, predicted))
    assert Counter(rest(gold[g]) for g, _ in pairs) == Counter(rest(predicted[p]) for _, p in pairs) == expected
    for value in set(expected):
        numbers = [(g, p) for g, p in pairs if rest(gold[g]) == value]
        assert [g for g, _ in numbers] == [g for g, item in enumerate(gold) if rest(item) == value][: len(numbers)]
        assert [p for _, p in numbers] == [p for p, item in enumerate(predicted) if rest(item) == value][: len(numbers)]


def test_boxes_pair_by_overlap_and_only_with_boxes() -> None:
    left, middle, right = (0.0, 0.0, 10.0, 1.0), (2.0, 0.0, 12.0, 1.0), (4.0, 0.0, 14.0, 1.0)
    gold = [("attack", "target", middle), ("attack", "target", left), ("attack", "place", right), ("meet", "x", "O1")]
    predicted = [("attack", "target", "O1"), ("attack", "target", middle), ("attack", "target", right)]
    assert sorted(pair(gold, predicted)) == [(0, 2), (1, 1)]
    assert len(pair(gold[:1] + gold[2:], predicted, ignored=1)) == 2
    assert pair(gold, [], ignored=1) == pair([], predicted) == []


LABEL_INDEX = {"entity": 0, "relation": 1, "trigger": 0, "argument": 1, "link": 1}
_NEAR_O1 = (0.0, 0.0, 10.0, 9.0)


def test_confusion_of_entity_types() -> None:
    gold = [("person", "Kyrie"), ("location", "Dallas"), ("person", "Luka")]
    predicted = [("location", "Kyrie"), ("location", "Dallas"), ("person", "Dirk")]
    assert confusion(gold, predicted, "entity") == {
        ("person", "location"): 1,
        ("location", "location"): 1,
        ("person", MISSED): 1,
        (SPURIOUS, "person"): 1,
    }


def test_confusion_pairs_equal_tuples_first_and_once() -> None:
    gold = [("person", "Jordan"), ("location", "Jordan")]
    assert confusion(gold, gold[::-1], "entity") == {("person", "person"): 1, ("location", "location"): 1}
    assert confusion(gold, [("location", "Jordan")] * 2, "entity") == {
        ("location", "location"): 1,
        ("person", "location"): 1,
    }
    assert confusion(gold, [("organization", "Jordan")] * 3, "entity") == {
        ("person", "organization"): 1,
        ("location", "organization"): 1,
        (SPURIOUS, "organization"): 1,
    }


def test_confusion_pairs_remaining_tuples_in_order() -> None:
    gold, predicted = [("a", "x"), ("b", "x")], [("c", "x"), ("d", "x")]
    assert confusion(gold, predicted, "trigger") == {("a", "c"): 1, ("b", "d"): 1}


def test_confusion_of_relations_includes_none() -> None:
    couple = [("a", "couple", "b")]
    assert confusion(couple, [("a", "none", "b")], "relation") == {("couple", "none"): 1}
    assert confusion([("a", "none", "b")], [("a", "none", "b")], "relation") == {("none", "none"): 1}
    assert confusion(couple, [("b", "couple", "a")], "relation") == {("couple", MISSED): 1, (SPURIOUS, "couple"): 1}
    assert confusion(couple, [], "relation") == {("couple", MISSED): 1}


def test_confusion_of_triggers_without_text() -> None:
    assert confusion([("attack", "")], [("meet", "")], "trigger") == {("attack", "meet"): 1}


def test_confusion_of_argument_roles() -> None:
    gold = [("attack", "target", BOXES["O1"]), ("attack", "attacker", "army")]
    predicted = [("attack", "attacker", _NEAR_O1), ("meet", "attacker", "army")]
    assert confusion(gold, predicted, "argument") == {
        ("target", "attacker"): 1,
        ("attacker", MISSED): 1,
        (SPURIOUS, "attacker"): 1,
    }
    assert confusion(gold[:1], [("attack", "target", "O1")], "argument") == {
        ("target", MISSED): 1,
        (SPURIOUS, "target"): 1,
    }
    assert confusion(gold[:1], [("attack", "place", _NEAR_O1), ("attack", "target", _NEAR_O1)], "argument") == {
        ("target", "target"): 1,
        (SPURIOUS, "place"): 1,
    }


@given(st.sampled_from(SUBTASKS), st.data())
def test_confusion_counts_every_tuple_once(subtask: str, data: st.DataObject) -> None:
    label = LABEL_INDEX[subtask]
    gold, predicted = data.draw(_tuples(subtask)), data.draw(_tuples(subtask))
    found = confusion(gold, predicted, subtask)
    of_gold, of_predicted, right = Counter[str](), Counter[str](), 0
    for (ours, theirs), times in found.items():
        of_gold[ours] += times
        of_predicted[theirs] += times
        right += times * (ours == theirs and (subtask, ours) != ("relation", "none"))
    del of_gold[SPURIOUS], of_predicted[MISSED]
    assert of_gold == Counter(item[label] for item in gold)
    assert of_predicted == Counter(item[label] for item in predicted)
    assert right == score(gold, predicted, subtask).tp
    mirrored = {(theirs, ours): times for (ours, theirs), times in confusion(predicted, gold, subtask).items()}
    if subtask != "argument":  # of boxes that overlap with several, either may be the one
        names = {MISSED: SPURIOUS, SPURIOUS: MISSED}
        assert found == {(names.get(a, a), names.get(b, b)): times for (a, b), times in mirrored.items()}


@given(asked_samples)
def test_confusion_of_the_gold_answer_is_diagonal(asked: tuple[str, dict[str, Any]]) -> None:
    subtask, sample = asked
    gold = gold_tuples(sample, subtask)
    predicted = score_sample(sample, format_answer(sample, subtask), subtask, LABELS[subtask]).tuples
    assert confusion(gold, predicted, subtask) == Counter((item[LABEL_INDEX[subtask]],) * 2 for item in gold)


def test_confusion_sums_over_samples() -> None:
    samples = [mee(), crowded()["argument"]]
    total = sum((confusion(gold_tuples(sample, "argument"), [], "argument") for sample in samples), Counter())
    assert total == {("attacker", MISSED): 1, ("target", MISSED): 7, ("place", MISSED): 4}


def test_confusion_of_an_unknown_subtask_raises() -> None:
    with pytest.raises(UserError, match="argument"):
        confusion([], [], "arguments")


def _tuples(subtask: str) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    names, labels = st.sampled_from("xy"), st.sampled_from(["a", "b", "none"])
    boxes = st.sampled_from([(float(x), 0.0, x + 10.0, 1.0) for x in (0, 2, 4)])
    parts = {
        "entity": (labels, names),
        "relation": (names, labels, names),
        "trigger": (labels, names | st.just("")),
        "argument": (names, labels, names | boxes),
        "link": (names, labels, names),
    }
    return st.lists(st.tuples(*parts[subtask]), max_size=6)
