"""Which gold tuple each predicted one stands for: one to one, so that tuples are multisets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lvlm_clorae.tasks.boxes import match_boxes

_BOX = object()
"""Stands for a box in what must be equal: boxes agree by overlap."""


def pair(
    gold: Sequence[tuple[Any, ...]], predicted: Sequence[tuple[Any, ...]], but: int | None = None
) -> list[tuple[int, int]]:
    """(index in `gold`, index in `predicted`) of the tuples that agree, as many as there can be, each used once.

    Equal tuples pair in their order. A box, which only the end of a tuple can be, agrees with one whose IoU is above
    0.5, as in the M2E2 code; see `match_boxes`. At the place `but`, never the end, tuples need not agree.
    """
    alike: dict[tuple[Any, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, tuples in enumerate((gold, predicted)):
        for number, item in enumerate(tuples):
            alike[_key(item, but)][side].append(number)
    found: list[tuple[int, int]] = []
    for key, (ours, theirs) in alike.items():
        if key[-1] is _BOX:
            boxes = match_boxes([gold[g][-1] for g in ours], [predicted[p][-1] for p in theirs])
            found += [(ours[g], theirs[p]) for g, p in boxes]
        else:
            found += zip(ours, theirs, strict=False)
    return found


def _key(item: tuple[Any, ...], but: int | None) -> tuple[Any, ...]:
    end = _BOX if isinstance(item[-1], tuple) else item[-1]
    return (*(part for place, part in enumerate(item[:-1]) if place != but), end)
