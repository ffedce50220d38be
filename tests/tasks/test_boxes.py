from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.tasks.boxes import Box, iou, match_boxes

_side = st.integers(0, 4)
_boxes = st.lists(
    st.tuples(_side, _side, _side, _side).map(
        lambda b: (float(b[0]), float(b[1]), b[0] + b[2] + 3.0, b[1] + b[3] + 3.0)
    ),
    max_size=4,
)


def count(gold: list[Box], predicted: list[Box], threshold: float = 0.5) -> int:
    """The number of pairs, which are sound: each box in one of them, and the two of each overlap."""
    pairs = match_boxes(gold, predicted, threshold)
    assert len({g for g, _ in pairs}) == len({p for _, p in pairs}) == len(pairs)
    assert all(iou(gold[g], predicted[p]) > threshold for g, p in pairs)
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


def test_a_half_is_not_above_a_half() -> None:
    assert count([(0.0, 0.0, 2.0, 2.0)], [(0.0, 0.0, 2.0, 1.0)]) == 0
    assert count([(0.0, 0.0, 2.0, 2.0)], [(0.0, 0.0, 2.0, 1.1)]) == 1


def test_each_box_is_used_once() -> None:
    box = (0.0, 0.0, 2.0, 2.0)
    assert count([box], [box, box]) == 1
    assert count([box, box], [box]) == 1
    assert count([box] * 3, [box] * 2) == 2
    assert count([], [box]) == count([box], []) == 0


@pytest.mark.parametrize("turned", [False, True])
def test_where_greedy_would_lose_a_match(turned: bool) -> None:
    left, middle, right = (0.0, 0.0, 10.0, 1.0), (2.0, 0.0, 12.0, 1.0), (4.0, 0.0, 14.0, 1.0)
    gold, predicted = [middle, left], [middle, right]  # middle fits both, right fits middle only
    assert count(gold, predicted[::-1] if turned else predicted) == 2


def test_a_long_chain_of_repairings_needs_no_deep_recursion() -> None:
    box = (0.0, 0.0, 2.0, 2.0)
    far = [(10.0 * n, 0.0, 10.0 * n + 10, 1.0) for n in range(150)]
    shifted = [(x1 + 5.0, y1, x2 + 5.0, y2) for x1, y1, x2, y2 in far]
    assert count(far, shifted, threshold=0.3) == 150
    assert count(shifted, far[::-1], threshold=0.3) == 150
    assert count([box] * 40, [box] * 40) == 40


@settings(max_examples=300)
@given(_boxes, _boxes)
def test_the_matching_is_maximum(gold: list[Box], predicted: list[Box]) -> None:
    few, many = sorted((gold, predicted), key=len)
    best = max(sum(iou(a, b) > 0.5 for a, b in zip(few, order, strict=True)) for order in permutations(many, len(few)))
    assert count(gold, predicted) == best
