"""What the training annotation alone scores, without a model: the floors beside which an F1 on real text is read.

- entity, trigger: every phrase that training annotates is looked up in the text and gets the reading that it has most
  often in training, "nothing" included.
- argument: the event types are those of the triggers found so; the phrases that are arguments of such an event in
  training are looked up in the same way, counted in the samples that have such an event. Objects are never named.
- relation: what is said most often of the same two names in training; of names that are new, the most frequent label
  but `none`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lvlm_clorae.tasks import NONE, Counts, gold_tuples, score
from lvlm_clorae.tasks.schema import plain

Sample = dict[str, Any]
Spans = Callable[[Sample], Iterable[tuple[int, int, Any]]]
"""The annotated spans of a sample: start, end (half open, in tokens) and what is said of them."""
Tuples = list[tuple[Any, ...]]
Predictor = Callable[[Sample], Tuples]


class Gazetteer:
    """The phrases that ``spans`` annotates in ``samples``, each with its most frequent reading; None is nothing."""

    def __init__(self, samples: Sequence[Sample], spans: Spans) -> None:
        readings: dict[tuple[str, ...], Counter[Any]] = defaultdict(Counter)
        for sample in samples:
            for start, end, label in spans(sample):
                readings[tuple(sample["tokens"][start:end])][label] += 1
        self._lengths = sorted({len(phrase) for phrase in readings}, reverse=True)
        self._labels: dict[tuple[str, ...], Any] = dict.fromkeys(readings)
        for sample in samples:
            annotated = {(start, end) for start, end, _ in spans(sample)}
            for start, end in self._occurrences(sample["tokens"]):
                if (start, end) not in annotated:
                    readings[tuple(sample["tokens"][start:end])][None] += 1
        for phrase, counts in readings.items():
            self._labels[phrase] = counts.most_common(1)[0][0]

    def find(self, tokens: Sequence[str]) -> list[tuple[Any, str]]:
        """(label, text) of the phrases in a text, from left to right, the longest at each place."""
        found = [tuple(tokens[start:end]) for start, end in self._occurrences(tokens)]
        return [(self._labels[phrase], plain(" ".join(phrase))) for phrase in found if self._labels[phrase] is not None]

    def _occurrences(self, tokens: Sequence[str]) -> Iterator[tuple[int, int]]:
        start = 0
        while start < len(tokens):
            ends = (start + length for length in self._lengths if start + length <= len(tokens))
            end = next((end for end in ends if tuple(tokens[start:end]) in self._labels), None)
            if end is not None:
                yield start, end
            start = end or start + 1


def entities(train: Sequence[Sample]) -> Predictor:
    """Predicts (type, text)."""
    names = Gazetteer(train, lambda sample: [(*entity["span"], entity["type"]) for entity in sample["entities"]])
    return lambda sample: list(names.find(sample["tokens"]))


def triggers(train: Sequence[Sample]) -> Predictor:
    """Predicts (type, text); what only the picture shows has no trigger and is not predicted."""

    def spans(sample: Sample) -> list[tuple[int, int, str]]:
        return [(*event["trigger"]["span"], event["type"]) for event in sample["events"] if event["trigger"]]

    words = Gazetteer(train, spans)
    return lambda sample: list(words.find(sample["tokens"]))


def arguments(train: Sequence[Sample]) -> Predictor:
    """Predicts (type, role, text)."""

    def of(kind: str) -> Gazetteer:
        def spans(sample: Sample) -> list[tuple[int, int, str]]:
            filled = [item for event in sample["events"] if event["type"] == kind for item in event["arguments"]]
            return [(*item["span"], item["role"]) for item in filled if "span" in item]

        return Gazetteer([sample for sample in train if kind in {event["type"] for event in sample["events"]}], spans)

    events = triggers(train)
    fillers = {kind: of(kind) for kind in sorted({event["type"] for sample in train for event in sample["events"]})}

    def predict(sample: Sample) -> Tuples:
        kinds = dict.fromkeys(kind for kind, _ in events(sample))
        return [(kind, *found) for kind in kinds for found in fillers[kind].find(sample["tokens"])]

    return predict


def relations(train: Sequence[Sample]) -> Predictor:
    """Predicts one (head, label, tail)."""
    said: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample in train:
        said[_names(sample)][sample["relation"]["label"]] += 1
    overall = Counter(sample["relation"]["label"] for sample in train)
    usual = next((label for label, _ in overall.most_common() if label != NONE), NONE)

    def predict(sample: Sample) -> Tuples:
        head, tail = _names(sample)
        known = said.get((head, tail))
        return [(head, known.most_common(1)[0][0] if known else usual, tail)]

    return predict


def _names(sample: Sample) -> tuple[str, str]:
    return plain(sample["relation"]["head"]["text"]), plain(sample["relation"]["tail"]["text"])


FLOORS: dict[str, Callable[[Sequence[Sample]], Predictor]] = {
    "entity": entities,
    "relation": relations,
    "trigger": triggers,
    "argument": arguments,
}


def floor(train: Sequence[Sample], test: Iterable[Sample], subtask: str) -> Counts:
    """Counts of the floor of a sub-task, learnt from ``train``, on ``test``."""
    predict = FLOORS[subtask](train)
    return sum((score(gold_tuples(sample, subtask), predict(sample), subtask) for sample in test), Counts())
