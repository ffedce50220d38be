"""Micro F1 over tuples (METHOD 7); docs/scoring.md compares the ways to match them.

Tuples are multisets: an answer that says a thing twice where gold says it once is half right. UMIE counts duplicates
wrongly, and `none` as a hit; neither is copied but in the mode that is there for comparison. A visual argument is right
when a box of the same type and role overlaps with IoU above 0.5, as in the M2E2 code, each box used once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.tasks.answer import Tuples, parse_with_errors, written_tuples
from lvlm_clorae.tasks.boxes import Box
from lvlm_clorae.tasks.offset import gold_places, locate
from lvlm_clorae.tasks.pairs import pair
from lvlm_clorae.tasks.schema import NONE, Labels, Sample, check_subtask

MATCHES = ("exact", "offset", "umie")
"""How tuples are matched: by text and box; entities by their place in the text; as UMIE's released code counts."""


@dataclass(frozen=True)
class Counts:
    """True positives, predicted and gold tuples. Add them over samples and ranks; never average their F1."""

    tp: int = 0
    predicted: int = 0
    gold: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.predicted + other.predicted, self.gold + other.gold)

    @property
    def precision(self) -> float:
        """Percent of the predicted tuples that are right, 0.0 where nothing was predicted."""
        return 100.0 * self.tp / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Percent of the gold tuples that were found, 0.0 where there are none."""
        return 100.0 * self.tp / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall in percent, 0.0 where nothing was predicted and nothing is gold."""
        total = self.predicted + self.gold
        return 100.0 * (2 * self.tp / total) if total else 0.0


class Scored(NamedTuple):
    """One answer: its counts, its tuples (arguments grounded), and how many of its pieces were malformed."""

    counts: Counts
    tuples: Tuples
    malformed: int


def gold_tuples(sample: Sample, subtask: str) -> Tuples:
    """The annotation of a sound sample as tuples, a visual argument as (type, role, (x1, y1, x2, y2)).

    The forms are those of `parse_answer`; a relation's `none` is still among them, `score` leaves it out.
    Raises UserError for an unknown sub-task.
    """
    tuples = written_tuples(sample, subtask)
    return ground(tuples, sample) if subtask == "argument" else tuples


def ground(tuples: Iterable[tuple[Any, ...]], sample: Sample) -> Tuples:
    """Argument tuples with each object id replaced by that object's box, four floats in pixels.

    An id that the sample does not have stays a string: it matches no box, and is right only if it is a gold text.
    """
    boxes: dict[str, Box] = {item["id"]: _box(item["box"]) for item in sample.get("objects") or ()}
    return [(kind, role, boxes.get(filler, filler)) for kind, role, filler in tuples]


def score(
    gold: Iterable[tuple[Any, ...]], predicted: Iterable[tuple[Any, ...]], subtask: str, match: str = "exact"
) -> Counts:
    """Counts of one sample's tuples, in the forms of `gold_tuples` (predicted arguments through `ground`).

    "exact": multiset intersection; boxes by maximum one-to-one matching; the relation `none`, in any case, counts on
    neither side. "offset": the same, entities being (type, start, end) of `gold_places` and `locate`. "umie": as UMIE's
    released code counts, faults included. Raises UserError for an unknown sub-task or match.
    """
    check_subtask(subtask)
    check_match(match)
    gold, predicted = list(gold), list(predicted)
    if match == "umie":
        return _as_umie(gold, predicted)
    if subtask == "relation":
        gold, predicted = _related(gold), _related(predicted)
    return Counts(len(pair(gold, predicted)), len(predicted), len(gold))


def score_sample(sample: Sample, answer: str, subtask: str, labels: Labels, match: str = "exact") -> Scored:
    """Parses and scores one generated answer.

    Never raises on any answer; UserError as in `parse_answer`, and for a `match` that is not in `MATCHES`.
    """
    check_match(match)
    predicted, malformed = parse_with_errors(answer, subtask, labels)
    if match == "offset" and subtask == "entity":
        return Scored(score(gold_places(sample), locate(predicted, sample), subtask, match), predicted, malformed)
    if subtask == "argument":
        predicted = ground(predicted, sample)
    return Scored(score(gold_tuples(sample, subtask), predicted, subtask, match), predicted, malformed)


def check_match(match: str) -> None:
    """Raises UserError, with the nearest valid name, unless `match` is one of `MATCHES`."""
    if match not in MATCHES:
        raise UserError(f'There is no way "{match}" to match tuples.{nearest(match, MATCHES)}')


def _as_umie(gold: Tuples, predicted: Tuples) -> Counts:
    """What `Metric.count_instance` of github.com/ZUCC-AI/UMIE, src/extraction/scorer.py (e608a12), counts.

    `none` is a relation like any other, a visual argument is right as the very object only, and a gold tuple is missed
    only where no prediction equals it: of a tuple that gold has twice and the answer once, the other one is not gold.
    """
    right, said = (Counter(gold) & Counter(predicted)).total(), set(predicted)
    return Counts(right, len(predicted), right + sum(item not in said for item in gold))


def _related(triples: Tuples) -> Tuples:
    return [triple for triple in triples if triple[1].casefold() != NONE]


def _box(values: Iterable[float]) -> Box:
    x1, y1, x2, y2 = map(float, values)
    return x1, y1, x2, y2
