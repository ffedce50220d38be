from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.tasks.pairs import pair

_triples = st.lists(st.tuples(*[st.sampled_from("ab")] * 3), max_size=6)


@pytest.mark.parametrize("but", [None, 0, 1])
@given(gold=_triples, predicted=_triples)
def test_texts_pair_as_multisets_in_their_order(but: int | None, gold: list[Any], predicted: list[Any]) -> None:
    def rest(item: tuple[str, ...]) -> tuple[str, ...]:
        return item if but is None else (*item[:but], *item[but + 1 :])

    pairs = pair(gold, predicted, but)
    expected = Counter(map(rest, gold)) & Counter(map(rest, predicted))
    assert Counter(rest(gold[g]) for g, _ in pairs) == Counter(rest(predicted[p]) for _, p in pairs) == expected
    for place in set(expected):
        numbers = [(g, p) for g, p in pairs if rest(gold[g]) == place]
        assert [g for g, _ in numbers] == [g for g, item in enumerate(gold) if rest(item) == place][: len(numbers)]
        assert [p for _, p in numbers] == [p for p, item in enumerate(predicted) if rest(item) == place][: len(numbers)]


def test_boxes_pair_by_overlap_with_boxes_only() -> None:
    left, middle, right = (0.0, 0.0, 10.0, 1.0), (2.0, 0.0, 12.0, 1.0), (4.0, 0.0, 14.0, 1.0)
    gold = [("attack", "target", middle), ("attack", "target", left), ("attack", "place", right), ("meet", "x", "O1")]
    predicted = [("attack", "target", "O1"), ("attack", "target", middle), ("attack", "target", right)]
    assert sorted(pair(gold, predicted)) == [(0, 2), (1, 1)]
    assert len(pair(gold[:1] + gold[2:], predicted, but=1)) == 2
    assert pair(gold, [], but=1) == pair([], predicted) == []
