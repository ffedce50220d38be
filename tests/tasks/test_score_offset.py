"""Scores of match "offset", compared with seqeval's for tags that an answer can express."""

from __future__ import annotations

import random
from typing import Any

import pytest
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2

from lvlm_clorae.tasks import Counts, format_answer, score_sample
from lvlm_clorae.tasks.score import gold_spans, locate
from tests.helpers.task_samples import LABELS, crowded, mner

TYPES = LABELS["entity"]
SEQUENCES = 1000


def tagged(rng: random.Random, size: int) -> list[str]:
    """Return a valid BIO sequence, in which entities of one type can be adjacent."""
    tags = [""] * size
    for position in range(size):
        before = tags[position - 1][2:] if position else ""
        begins = [f"B-{entity_type}" for entity_type in TYPES]
        tags[position] = rng.choice(["O"] * 4 + begins + [f"I-{before}"] * 4 * bool(before))
    return tags


def perturbed(rng: random.Random, tags: list[str]) -> list[str]:
    """Remove some entities, change the type of others, and generate the rest from a random position anew."""
    start = rng.randrange(len(tags) + 1)
    while start < len(tags) and tags[start].startswith("I-"):
        start += 1
    found = tags[:start] + tagged(rng, len(tags) - start)
    for begin, end in spans(found):
        if rng.random() < 0.2:
            found[begin:end] = ["O"] * (end - begin)
        elif rng.random() < 0.2:
            entity_type = rng.choice(TYPES)
            found[begin:end] = [f"B-{entity_type}"] + [f"I-{entity_type}"] * (end - begin - 1)
    return found


def spans(tags: list[str]) -> list[tuple[int, int]]:
    starts = [position for position, tag in enumerate(tags) if tag.startswith("B-")]
    ends = [next((p for p in range(s + 1, len(tags)) if not tags[p].startswith("I-")), len(tags)) for s in starts]
    return list(zip(starts, ends, strict=True))


def sample_of(tokens: list[str], tags: list[str]) -> dict[str, Any]:
    entities = [
        {"type": tags[start][2:], "span": [start, end], "text": " ".join(tokens[start:end])}
        for start, end in spans(tags)
    ]
    return {"task": "mner", "text": " ".join(tokens), "tokens": tokens, "entities": entities}


def counted(tokens: list[list[str]], gold: list[list[str]], predicted: list[list[str]]) -> Counts:
    """Return the counts of the predictions, each formatted as an answer."""
    counts = Counts()
    for words, ours, theirs in zip(tokens, gold, predicted, strict=True):
        answer = format_answer(sample_of(words, theirs), "entity")
        counts += score_sample(sample_of(words, ours), answer, "entity", TYPES, "offset").counts
    return counts


def assert_as_seqeval(counts: Counts, gold: list[list[str]], predicted: list[list[str]]) -> None:
    strict = {"mode": "strict", "scheme": IOB2}
    assert counts.precision == pytest.approx(100 * precision_score(gold, predicted, **strict), abs=1e-9)
    assert counts.recall == pytest.approx(100 * recall_score(gold, predicted, **strict), abs=1e-9)
    assert counts.f1 == pytest.approx(100 * f1_score(gold, predicted, **strict), abs=1e-9)
    assert 20 < counts.f1 < 95, "neither all correct nor all wrong"


def test_equal_to_seqeval_for_distinct_words() -> None:
    rng = random.Random(1)
    gold = [tagged(rng, rng.randint(1, 20)) for _ in range(SEQUENCES)]
    predicted = [perturbed(rng, tags) for tags in gold]
    tokens = [[f"w{position}" for position in range(len(tags))] for tags in gold]
    assert_as_seqeval(counted(tokens, gold, predicted), gold, predicted)


def expressible(names: list[str], types: list[str]) -> bool:
    """Return whether an answer can express these occurrences ("" is no entity): a later one needs all earlier ones."""
    said = {
        name: [entity_type != "" for n, entity_type in zip(names, types, strict=True) if n == name] for name in names
    }
    return all(found == sorted(found, reverse=True) for found in said.values())


def written(names: list[str], types: list[str]) -> tuple[list[str], list[str]]:
    """Return words and tags of names; b and e have two words, c and f three, and no name contains another."""
    words, tags = [], []
    for name, entity_type in zip(names, types, strict=True):
        size = "abcdef".index(name) % 3 + 1
        words += [f"{name}{number}" for number in range(size)]
        tags += [f"B-{entity_type}"] + [f"I-{entity_type}"] * (size - 1) if entity_type else ["O"] * size
    return words, tags


@pytest.mark.integration
def test_equal_to_seqeval_for_repeated_names() -> None:
    """Any occurrence can be gold; predictions that an answer cannot express are generated again."""
    rng = random.Random(2)
    tokens, gold, predicted = [], [], []
    while len(tokens) < SEQUENCES:
        names = rng.choices("abcdef", k=rng.randint(1, 10))
        ours = rng.choices(["", *TYPES], k=len(names))
        theirs = [entity_type if rng.random() < 0.7 else rng.choice(["", *TYPES]) for entity_type in ours]
        if expressible(names, theirs):
            words, tags = written(names, ours)
            tokens.append(words)
            gold.append(tags)
            predicted.append(written(names, theirs)[1])
    assert sum(len(set(words)) < len(words) for words in tokens) > SEQUENCES / 4
    assert_as_seqeval(counted(tokens, gold, predicted), gold, predicted)


def score(sample: dict[str, Any], answer: str, match: str) -> Counts:
    return score_sample(sample, answer, "entity", TYPES, match).counts


def test_kth_mention_is_the_kth_occurrence() -> None:
    sample = sample_of(["Jordan", "visits", "Jordan"], ["B-person", "O", "B-location"])
    assert score(sample, "person, Jordan <spot> location, Jordan", "offset") == Counts(2, 2, 2)
    assert score(sample, "location, Jordan <spot> person, Jordan", "offset") == Counts(0, 2, 2)
    assert score(sample, "location, Jordan <spot> person, Jordan", "exact") == Counts(2, 2, 2)
    assert score(sample, "location, Jordan", "offset") == Counts(0, 1, 2)


def test_mention_is_located_at_an_earlier_occurrence() -> None:
    sample = sample_of(["may", "May", "may"], ["O", "O", "B-person"])
    assert score(sample, "person, may", "offset") == Counts(0, 1, 1)
    assert score(sample, "person, may <spot> person, may", "offset") == Counts(1, 2, 1)


def test_absent_and_repeated_mentions_are_wrong() -> None:
    assert score(mner(), "person, Kyrie <spot> person, Irving", "offset") == Counts(1, 2, 2)
    assert score(mner(), "person, Kyrie <spot> person, Kyrie", "offset") == Counts(1, 2, 2)
    assert score(mner(), "person, kyrie <spot> person, Kyri <spot> person, Kyrie leaves Dallas . .", "offset").tp == 0


def test_occurrence_inside_a_longer_mention_comes_last() -> None:
    sample = crowded()["entity"]
    assert score(sample, format_answer(sample, "entity"), "offset") == Counts(4, 4, 4)
    assert locate([("location", "New York")], sample) == [("location", 0, 2)]
    both = [("location", "New York"), ("organization", "New York Times"), ("location", "New York"), ("person", "New")]
    assert locate(both, sample) == [("location", 4, 6), ("organization", 0, 3), ("location", 0, 2), ("person", 0, 1)]
    assert locate([("person", "York"), *both[:1] * 3], sample)[-1] == ("location", "New York")


def test_offsets_of_blank_tokens_and_markers() -> None:
    sample = sample_of(["", "x<spot>y", " ", "Kyrie"], ["O", "B-person", "I-person", "B-person"])
    assert gold_spans(sample) == [("person", 0, 3), ("person", 3, 4)]
    assert score(sample, "person, x< spot >y <spot> person, Kyrie", "offset") == Counts(2, 2, 2)
