"""Pairing of gold and predicted tuples: equal text, overlapping boxes, and the confusion counts of labels."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Any

from lvlm_clorae.tasks.schema import check_subtask

Box = tuple[float, ...]
"""x1, y1, x2, y2 in pixels."""

MISSED = "(missed)"
"""The predicted label of a gold tuple without a prediction. Parentheses keep it distinct from dataset labels."""
SPURIOUS = "(spurious)"
"""The gold label of a prediction without a gold tuple."""

_LABEL_INDEX = {"entity": 0, "relation": 1, "trigger": 0, "argument": 1, "link": 1}
_BOX = object()  # replaces a box in the keys of `pair`, because boxes agree by overlap and not by equality


def iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes, 0.0 to 1.0; 0.0 if either box has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return intersection / (areas - intersection)


def match_boxes(gold: Sequence[Box], predicted: Sequence[Box]) -> list[tuple[int, int]]:
    """Match as many boxes of IoU above 0.5 as possible one to one; (gold, predicted) indices, sorted.

    This is maximum bipartite matching: with greedy matching the score would depend on the order of the answer.
    """
    candidates = [[g for g, box in enumerate(gold) if iou(box, other) > 0.5] for other in predicted]
    of_gold: dict[int, int] = {}
    of_predicted: dict[int, int] = {}
    for start in range(len(predicted)):
        _augment(start, candidates, of_gold, of_predicted)
    return sorted(of_gold.items())


def _augment(start: int, candidates: list[list[int]], of_gold: dict[int, int], of_predicted: dict[int, int]) -> None:
    """Match `start` as well, along the shortest augmenting path to an unmatched gold box, if there is one."""
    reached_from: dict[int, int] = {}
    queue = deque([start])
    while queue:
        p = queue.popleft()
        for g in candidates[p]:
            if g in reached_from:
                continue
            reached_from[g] = p
            if g in of_gold:
                queue.append(of_gold[g])
                continue
            free: int | None = g
            while free is not None:
                p = of_gold[free] = reached_from[free]
                of_predicted[p], free = free, of_predicted.get(p)
            return


def pair(
    gold: Sequence[tuple[Any, ...]], predicted: Sequence[tuple[Any, ...]], ignored: int | None = None
) -> list[tuple[int, int]]:
    """Pair equal tuples one to one, as many as possible and in their order; return (gold, predicted) indices.

    A box can only be the last item, and equals a box of IoU above 0.5, as in the M2E2 code. The item at the index
    `ignored` may differ.
    """
    groups: dict[tuple[Any, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, tuples in enumerate((gold, predicted)):
        for number, item in enumerate(tuples):
            groups[_key(item, ignored)][side].append(number)
    pairs: list[tuple[int, int]] = []
    for key, (of_gold, of_predicted) in groups.items():
        if key[-1] is _BOX:
            boxes = match_boxes([gold[g][-1] for g in of_gold], [predicted[p][-1] for p in of_predicted])
            pairs += [(of_gold[g], of_predicted[p]) for g, p in boxes]
        else:
            pairs += zip(of_gold, of_predicted, strict=False)
    return pairs


def _key(item: tuple[Any, ...], ignored: int | None) -> tuple[Any, ...]:
    last = _BOX if isinstance(item[-1], tuple) else item[-1]
    return (*(value for index, value in enumerate(item[:-1]) if index != ignored), last)


def confusion(
    gold: Iterable[tuple[Any, ...]], predicted: Iterable[tuple[Any, ...]], subtask: str
) -> Counter[tuple[str, str]]:
    """Count the (gold label, predicted label) pairs of one sample; add the counters over samples and ranks.

    Tuples that differ only in their label are confused: entity types of the same text, relations and links of the same
    head and tail (`none` included), event types of the same trigger (those without a text are the same), and argument
    roles of the same filler in an event of the same type. Each tuple counts once: equal tuples are paired first, then
    those that differ in the label, in order; others count as `MISSED` and `SPURIOUS`. Raises UserError for an unknown
    sub-task.
    """
    check_subtask(subtask)
    label = _LABEL_INDEX[subtask]
    left, right = list(gold), list(predicted)
    counts: Counter[tuple[str, str]] = Counter()
    for ignored in (None, label):
        pairs = pair(left, right, ignored)
        counts.update((left[g][label], right[p][label]) for g, p in pairs)
        left = _without(left, {g for g, _ in pairs})
        right = _without(right, {p for _, p in pairs})
    counts.update((item[label], MISSED) for item in left)
    counts.update((SPURIOUS, item[label]) for item in right)
    return counts


def _without(tuples: list[tuple[Any, ...]], paired: set[int]) -> list[tuple[Any, ...]]:
    return [item for number, item in enumerate(tuples) if number not in paired]
