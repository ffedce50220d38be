"""Micro F1 over tuples; docs/scoring.md compares the ways to match them.

Tuples are multisets: a tuple that occurs once in gold and twice in the answer gives one true and one false positive. A
visual argument is correct if a box of the same type and role has an IoU above 0.5, as in the M2E2 code, and each box is
used once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.tasks.answer import Tuples, parse_with_errors, written_tuples
from lvlm_clorae.tasks.matching import pair
from lvlm_clorae.tasks.schema import NONE, Labels, Sample, check_subtask, plain

MATCHES = ("exact", "offset", "strict", "umie")
"""Ways to match tuples: by text and box; entities by their position in the text; entities, triggers and arguments by
their position or object; as UMIE's released code counts."""


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
        """Precision in percent; 0.0 without predictions."""
        return 100.0 * self.tp / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Recall in percent; 0.0 without gold tuples."""
        return 100.0 * self.tp / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """F1 in percent; 0.0 without predictions and gold tuples."""
        total = self.predicted + self.gold
        return 100.0 * (2 * self.tp / total) if total else 0.0


class Scored(NamedTuple):
    """The counts of one answer, its tuples (visual arguments as boxes) and its number of malformed pieces."""

    counts: Counts
    tuples: Tuples
    malformed: int


def gold_tuples(sample: Sample, subtask: str) -> Tuples:
    """Return a valid sample's annotation in the forms of `parse_answer`, but visual arguments as boxes (`ground`).

    A relation's `none` is included; `score` leaves it out. Raises UserError for an unknown sub-task.
    """
    tuples = written_tuples(sample, subtask)
    return ground(tuples, sample) if subtask == "argument" else tuples


def ground(tuples: Iterable[tuple[Any, ...]], sample: Sample) -> Tuples:
    """Replace each object id of the sample in argument tuples by the object's box, four floats in pixels."""
    boxes = {item["id"]: tuple(map(float, item["box"])) for item in sample.get("objects") or ()}
    return [(event_type, role, boxes.get(filler, filler)) for event_type, role, filler in tuples]


def gold_spans(sample: Sample, subtask: str = "entity") -> Tuples:
    """Return entities or triggers of a valid sample as (type, start, end), arguments as ((type, role), start, end).

    Offsets are half-open, in the words of `locate`. A mention that is not verbatim stays (type, text), an event without
    a trigger (type, ""), and a visual argument ((type, role), object id).
    """
    starts = [0, *accumulate(len(words) for words in _words(sample))]

    def place(item: dict[str, Any] | None) -> tuple[Any, ...]:
        if item and "object" in item:
            return (item["object"],)
        if not item or not item.get("verbatim", True):
            return (plain(item["text"]) if item else "",)
        return tuple(starts[offset] for offset in item["span"])

    if subtask == "entity":
        return [(item["type"], *place(item)) for item in sample.get("entities") or ()]
    events = sample.get("events") or ()
    if subtask == "trigger":
        return [(event["type"], *place(event["trigger"])) for event in events]
    return [((event["type"], item["role"]), *place(item)) for event in events for item in event["arguments"]]


def locate(entities: Sequence[tuple[str, str]], sample: Sample) -> Tuples:
    """Return each (type, text) of an answer as (type, start, end), for scores comparable with those of taggers.

    An answer does not state which occurrence of a text it means, and gold is not consulted: the k-th mention of a text
    is its k-th occurrence, and an occurrence inside a longer entity of the same answer comes last ("New York" in "New
    York Times"). All entities of Twitter-15 are found at their position; an entity after an occurrence that is none
    would not be. A text without a further occurrence stays (type, text), and matches no position.
    """
    words = [word for token in _words(sample) for word in token]
    mentions = [text.split() for _, text in entities]
    available: dict[str, list[tuple[int, int]]] = {}
    used: set[int] = set()
    located: Tuples = list(entities)
    for number in sorted(range(len(entities)), key=lambda number: -len(mentions[number])):
        entity_type, text = entities[number]
        if text not in available:
            size = len(mentions[number])
            spans = ((start, start + size) for start in range(len(words) - size + 1))
            available[text] = [span for span in spans if words[slice(*span)] == mentions[number]]
        if available[text]:
            span = next((span for span in available[text] if used.isdisjoint(range(*span))), available[text][0])
            available[text].remove(span)
            used.update(range(*span))
            located[number] = (entity_type, *span)
    return located


def locate_events(tuples: Iterable[tuple[Any, ...]], subtask: str, sample: Sample) -> Tuples:
    """Return the trigger or argument tuples of an answer in the forms of `gold_spans`.

    Each label is located on its own, since one word can have two types or roles: of a label, the k-th mention of a text
    is its k-th occurrence, as in `locate`, and mentions beyond are at the first one. Object ids stay.
    """
    ids = {"", *(item["id"] for item in sample.get("objects") or ())}
    groups: defaultdict[Any, list[tuple[Any, str]]] = defaultdict(list)
    for *names, text in tuples:
        label = names[0] if subtask == "trigger" else tuple(names)
        groups[label if text not in ids else None].append((label, text))
    located: Tuples = list(groups.pop(None, ()))
    for mentions in groups.values():
        found = locate(mentions, sample)
        first = {text: item for (_, text), item in zip(reversed(mentions), reversed(found), strict=True)}
        located += [first[text] if len(item) == 2 else item for (_, text), item in zip(mentions, found, strict=True)]
    return located


def _words(sample: Sample) -> list[list[str]]:
    """Return the words of each token as answers spell them: usually one, none of a blank token, several of a marker."""
    return [plain(token).split() for token in sample["tokens"]]


def score(
    gold: Iterable[tuple[Any, ...]], predicted: Iterable[tuple[Any, ...]], subtask: str, match: str = "exact"
) -> Counts:
    """Count the true positives, predicted and gold tuples of one sample.

    Args:
        gold: the tuples of `gold_tuples`, or of `gold_spans` with the matches that compare positions
        predicted: tuples of the same form (`ground`, `locate`, `locate_events`)
        subtask: their sub-task; UserError for an unknown one
        match: one of `MATCHES`; all but "umie" leave the relation `none` out on both sides
    """
    check_subtask(subtask)
    if match not in MATCHES:
        raise UserError(f'Unknown match "{match}".{nearest(match, MATCHES)}')
    gold, predicted = list(gold), list(predicted)
    if match == "umie":
        return _umie_counts(gold, predicted)
    if subtask == "relation":
        gold, predicted = ([item for item in tuples if item[1].casefold() != NONE] for tuples in (gold, predicted))
    return Counts(len(pair(gold, predicted)), len(predicted), len(gold))


def score_sample(sample: Sample, answer: str, subtask: str, labels: Labels, match: str = "exact") -> Scored:
    """Parse and score one generated answer. Raises UserError as `parse_answer` and `score` do."""
    predicted, malformed = parse_with_errors(answer, subtask, labels)
    shown = ground(predicted, sample) if subtask == "argument" else predicted
    if match in ("offset", "strict") and subtask == "entity":
        return Scored(score(gold_spans(sample), locate(predicted, sample), subtask, match), shown, malformed)
    if match == "strict" and subtask in ("trigger", "argument"):
        located = locate_events(predicted, subtask, sample)
        return Scored(score(gold_spans(sample, subtask), located, subtask, match), shown, malformed)
    return Scored(score(gold_tuples(sample, subtask), shown, subtask, match), shown, malformed)


def _umie_counts(gold: Tuples, predicted: Tuples) -> Counts:
    """Count as `Metric.count_instance` of github.com/ZUCC-AI/UMIE, src/extraction/scorer.py (e608a12).

    `none` is a relation like any other, a visual argument needs exactly the gold box, and a gold tuple is missed only
    if no prediction equals it: if gold has a tuple twice and the answer once, the second is not counted as gold.
    """
    correct, distinct = (Counter(gold) & Counter(predicted)).total(), set(predicted)
    return Counts(correct, len(predicted), correct + sum(item not in distinct for item in gold))
