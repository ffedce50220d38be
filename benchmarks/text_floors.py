"""F1 of lookup baselines that use the training annotation without a model, as floors for F1 on real text.

- entity, trigger: every phrase annotated in training is looked up in the text and gets its most frequent training
  label, which may be none. Entities that are not in the text as written (values of receipts) are left out.
- argument: event types are those of the triggers found so. Phrases that are arguments of such an event in training are
  looked up in the same way, counted in samples with such an event. Objects are never predicted.
- relation: the most frequent training label of the same two names; for new names the most frequent label other than
  `none`.
- link: none, since the words of a form's questions and answers are seldom those of another form.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.tasks import NONE, Counts, gold_tuples, score
from lvlm_clorae.tasks.schema import plain

Sample = dict[str, Any]
Spans = Callable[[Sample], Iterable[tuple[int, int, Any]]]
"""Function from a sample to its annotated spans: start, end (exclusive, in tokens) and label."""
Tuples = list[tuple[Any, ...]]
Predictor = Callable[[Sample], Tuples]


class Gazetteer:
    """Phrases that ``spans`` annotates in ``samples``, each with its most frequent label or None."""

    def __init__(self, samples: Sequence[Sample], spans: Spans) -> None:
        label_counts: dict[tuple[str, ...], Counter[Any]] = defaultdict(Counter)
        for sample in samples:
            for start, end, label in spans(sample):
                label_counts[tuple(sample["tokens"][start:end])][label] += 1
        self._lengths = sorted({len(phrase) for phrase in label_counts}, reverse=True)
        self._labels: dict[tuple[str, ...], Any] = dict.fromkeys(label_counts)
        for sample in samples:
            annotated = {(start, end) for start, end, _ in spans(sample)}
            for start, end in self._occurrences(sample["tokens"]):
                if (start, end) not in annotated:
                    label_counts[tuple(sample["tokens"][start:end])][None] += 1
        for phrase, counts in label_counts.items():
            self._labels[phrase] = counts.most_common(1)[0][0]

    def find(self, tokens: Sequence[str]) -> list[tuple[Any, str]]:
        """Find (label, text) of the phrases in a text from left to right, the longest at each position."""
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
    """Make a predictor of (type, text)."""

    def spans(sample: Sample) -> list[tuple[int, int, str]]:
        return [(*entity["span"], entity["type"]) for entity in sample["entities"] if "span" in entity]

    names = Gazetteer(train, spans)
    return lambda sample: list(names.find(sample["tokens"]))


def triggers(train: Sequence[Sample]) -> Predictor:
    """Make a predictor of (type, text). Events without a trigger, shown only by the image, are not predicted."""

    def spans(sample: Sample) -> list[tuple[int, int, str]]:
        return [(*event["trigger"]["span"], event["type"]) for event in sample["events"] if event["trigger"]]

    words = Gazetteer(train, spans)
    return lambda sample: list(words.find(sample["tokens"]))


def arguments(train: Sequence[Sample]) -> Predictor:
    """Make a predictor of (type, role, text)."""

    def phrases(event_type: str) -> Gazetteer:
        def spans(sample: Sample) -> list[tuple[int, int, str]]:
            filled = [item for event in sample["events"] if event["type"] == event_type for item in event["arguments"]]
            return [(*item["span"], item["role"]) for item in filled if "span" in item]

        having = [sample for sample in train if event_type in {event["type"] for event in sample["events"]}]
        return Gazetteer(having, spans)

    events = triggers(train)
    types = sorted({event["type"] for sample in train for event in sample["events"]})
    fillers = {name: phrases(name) for name in types}

    def predict(sample: Sample) -> Tuples:
        found = dict.fromkeys(name for name, _ in events(sample))
        return [(name, *filler) for name in found for filler in fillers[name].find(sample["tokens"])]

    return predict


def relations(train: Sequence[Sample]) -> Predictor:
    """Make a predictor of one (head, label, tail)."""
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
    """Score the baseline of a sub-task, built from ``train``, on ``test``."""
    predict = FLOORS[subtask](train)
    return sum((score(gold_tuples(sample, subtask), predict(sample), subtask) for sample in test), Counts())


def floors(shards: Path) -> dict[str, Counts]:
    """Return the counts on test of each dataset task that has a baseline."""
    index = load_index(shards)

    def samples(name: str, split: str) -> list[Sample]:
        return [sample for _, sample, _ in read_samples(shards, index, name, split)]

    return {
        name: floor(samples(task.dataset, "train"), samples(task.dataset, "test"), task.subtask)
        for name, task in index.dataset_tasks("test").items()
        if task.subtask in FLOORS
    }
