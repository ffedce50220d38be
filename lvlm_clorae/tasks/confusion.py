"""What is taken for what: the labels of gold and predicted tuples that agree in everything else.

entity     types of the same text
relation   relations between the same head and tail; `none` is a label here like any other
trigger    types of the same trigger, those without one being the same
argument   roles of the same filler (text, or box by overlap) in an event of the same type; types are the trigger's
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lvlm_clorae.tasks.pairs import pair
from lvlm_clorae.tasks.schema import check_subtask

MISSED = "(missed)"
"""The predicted label where nothing was predicted; in brackets, since a dataset may have a label of that name."""
SPURIOUS = "(spurious)"
"""The gold label where nothing is gold."""

_LABEL = {"entity": 0, "relation": 1, "trigger": 0, "argument": 1}


def confusion(
    gold: Iterable[tuple[Any, ...]], predicted: Iterable[tuple[Any, ...]], subtask: str
) -> Counter[tuple[str, str]]:
    """How often each (gold label, predicted label) occurs in one sample; add them over samples and ranks.

    The tuples are those of `gold_tuples` and `Scored.tuples`. Each is counted once: right ones with their own label
    first, which are the true positives of `score` (and pairs of `none`); then what differs in the label only, in the
    order of gold and answer; the rest is `MISSED` and `SPURIOUS`. Raises UserError for an unknown sub-task.
    """
    check_subtask(subtask)
    label = _LABEL[subtask]
    left, right = list(gold), list(predicted)
    counts: Counter[tuple[str, str]] = Counter()
    for but in (None, label):
        pairs = pair(left, right, but)
        counts.update((left[g][label], right[p][label]) for g, p in pairs)
        left = _without(left, {g for g, _ in pairs})
        right = _without(right, {p for _, p in pairs})
    counts.update((item[label], MISSED) for item in left)
    counts.update((SPURIOUS, item[label]) for item in right)
    return counts


def _without(tuples: list[tuple[Any, ...]], paired: set[int]) -> list[tuple[Any, ...]]:
    return [item for number, item in enumerate(tuples) if number not in paired]
