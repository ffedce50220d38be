"""Boxes (x1, y1, x2, y2) in pixels: their overlap, and which of two sets can be paired."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

Box = tuple[float, float, float, float]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0.0 to 1.0; 0.0 where either has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / (_area(a) + _area(b) - both)


def match_boxes(gold: Sequence[Box], predicted: Sequence[Box], threshold: float = 0.5) -> list[tuple[int, int]]:
    """The most pairs (index of a gold, of a predicted box, each used once) whose IoU is above `threshold`.

    Maximum bipartite matching by augmenting paths. Taking the best or the first free box for each prediction can
    leave a later one without its only partner, and the score would depend on the order of the answer.
    """
    partners = [[g for g, box in enumerate(gold) if iou(box, guess) > threshold] for guess in predicted]
    of_gold: dict[int, int] = {}
    of_predicted: dict[int, int] = {}
    for start in range(len(predicted)):
        _augment(start, partners, of_gold, of_predicted)
    return sorted(of_gold.items())


def _augment(start: int, partners: list[list[int]], of_gold: dict[int, int], of_predicted: dict[int, int]) -> None:
    """Pairs `start` too, re-pairing others along the shortest path to a free gold box, if there is one."""
    reached_from: dict[int, int] = {}
    queue = deque([start])
    while queue:
        guess = queue.popleft()
        for g in partners[guess]:
            if g in reached_from:
                continue
            reached_from[g] = guess
            if g in of_gold:
                queue.append(of_gold[g])
                continue
            freed: int | None = g
            while freed is not None:
                guess = reached_from[freed]
                of_gold[freed] = guess
                given_up = of_predicted.get(guess)
                of_predicted[guess] = freed
                freed = given_up
            return


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
