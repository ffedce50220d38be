"""Offset scores against seqeval's, of tags that an answer can say."""

from __future__ import annotations

import random
from typing import Any

import pytest
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2

from lvlm_clorae.tasks import Counts, format_answer, score_sample
from lvlm_clorae.tasks.offset import gold_places, locate

from .samples import LABELS, crowded, mner

TYPES = LABELS["entity"]
SEQUENCES = 1000


def tagged(chance: random.Random, size: int) -> list[str]:
    """A sound BIO sequence, so that entities of one type may touch."""
    tags = [""] * size
    for place in range(size):
        before = tags[place - 1][2:] if place else ""
        begins = [f"B-{kind}" for kind in TYPES]
        tags[place] = chance.choice(["O"] * 4 + begins + [f"I-{before}"] * 4 * bool(before))
    return tags


def perturbed(chance: random.Random, tags: list[str]) -> list[str]:
    """Some entities taken away, some of another type, and the rest of the sequence drawn anew from some place on."""
    start = chance.randrange(len(tags) + 1)
    while start < len(tags) and tags[start].startswith("I-"):
        start += 1
    found = tags[:start] + tagged(chance, len(tags) - start)
    for begin, end in spans(found):
        if chance.random() < 0.2:
            found[begin:end] = ["O"] * (end - begin)
        elif chance.random() < 0.2:
            kind = chance.choice(TYPES)
            found[begin:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - begin - 1)
    return found


def spans(tags: list[str]) -> list[tuple[int, int]]:
    starts = [place for place, tag in enumerate(tags) if tag.startswith("B-")]
    ends = [next((p for p in range(s + 1, len(tags)) if not tags[p].startswith("I-")), len(tags)) for s in starts]
    return list(zip(starts, ends, strict=True))


def sample_of(tokens: list[str], tags: list[str]) -> dict[str, Any]:
    entities = [
        {"type": tags[start][2:], "span": [start, end], "text": " ".join(tokens[start:end])}
        for start, end in spans(tags)
    ]
    return {"task": "mner", "text": " ".join(tokens), "tokens": tokens, "entities": entities}


def counted(tokens: list[list[str]], gold: list[list[str]], predicted: list[list[str]]) -> Counts:
    """Each prediction written as an answer, and scored."""
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
    assert 20 < counts.f1 < 95, "neither all right nor all wrong"


def test_seqeval_on_words_that_occur_once() -> None:
    """There an answer says all that tags say."""
    chance = random.Random(1)
    gold = [tagged(chance, chance.randint(1, 20)) for _ in range(SEQUENCES)]
    predicted = [perturbed(chance, tags) for tags in gold]
    tokens = [[f"w{place}" for place in range(len(tags))] for tags in gold]
    assert_as_seqeval(counted(tokens, gold, predicted), gold, predicted)


def sayable(names: list[str], types: list[str]) -> bool:
    """Whether an answer can mean these occurrences ("" is no entity): a later one only after all earlier ones."""
    said = {name: [kind != "" for n, kind in zip(names, types, strict=True) if n == name] for name in names}
    return all(found == sorted(found, reverse=True) for found in said.values())


def written(names: list[str], types: list[str]) -> tuple[list[str], list[str]]:
    """Words and tags of names, of which b and e have two words, and c and f three; no name is in another."""
    words, tags = [], []
    for name, kind in zip(names, types, strict=True):
        size = "abcdef".index(name) % 3 + 1
        words += [f"{name}{number}" for number in range(size)]
        tags += [f"B-{kind}"] + [f"I-{kind}"] * (size - 1) if kind else ["O"] * size
    return words, tags


def test_seqeval_on_names_that_occur_often() -> None:
    """Any occurrence may be gold, and predicted is what an answer can say: other predictions are drawn again."""
    chance = random.Random(2)
    tokens, gold, predicted = [], [], []
    while len(tokens) < SEQUENCES:
        names = chance.choices("abcdef", k=chance.randint(1, 10))
        ours = chance.choices(["", *TYPES], k=len(names))
        theirs = [kind if chance.random() < 0.7 else chance.choice(["", *TYPES]) for kind in ours]
        if sayable(names, theirs):
            words, tags = written(names, ours)
            tokens.append(words)
            gold.append(tags)
            predicted.append(written(names, theirs)[1])
    assert sum(len(set(words)) < len(words) for words in tokens) > SEQUENCES / 4
    assert_as_seqeval(counted(tokens, gold, predicted), gold, predicted)


def score(sample: dict[str, Any], answer: str, match: str) -> Counts:
    return score_sample(sample, answer, "entity", TYPES, match).counts


def test_the_kth_mention_is_the_kth_occurrence() -> None:
    sample = sample_of(["Jordan", "visits", "Jordan"], ["B-person", "O", "B-location"])
    assert score(sample, "person, Jordan <spot> location, Jordan", "offset") == Counts(2, 2, 2)
    assert score(sample, "location, Jordan <spot> person, Jordan", "offset") == Counts(0, 2, 2)
    assert score(sample, "location, Jordan <spot> person, Jordan", "exact") == Counts(2, 2, 2)
    assert score(sample, "location, Jordan", "offset") == Counts(0, 1, 2)


def test_an_earlier_occurrence_that_is_no_entity_is_what_an_answer_means() -> None:
    sample = sample_of(["may", "May", "may"], ["O", "O", "B-person"])
    assert score(sample, "person, may", "offset") == Counts(0, 1, 1)
    assert score(sample, "person, may <spot> person, may", "offset") == Counts(1, 2, 1)


def test_what_is_nowhere_or_said_too_often_is_wrong() -> None:
    assert score(mner(), "person, Kyrie <spot> person, Irving", "offset") == Counts(1, 2, 2)
    assert score(mner(), "person, Kyrie <spot> person, Kyrie", "offset") == Counts(1, 2, 2)
    assert score(mner(), "person, kyrie <spot> person, Kyri <spot> person, Kyrie leaves Dallas . .", "offset").tp == 0


def test_a_name_in_a_longer_name_of_the_answer_comes_last() -> None:
    sample = crowded()["entity"]
    assert score(sample, format_answer(sample, "entity"), "offset") == Counts(4, 4, 4)
    assert locate([("location", "New York")], sample) == [("location", 0, 2)]
    both = [("location", "New York"), ("organization", "New York Times"), ("location", "New York"), ("person", "New")]
    assert locate(both, sample) == [("location", 4, 6), ("organization", 0, 3), ("location", 0, 2), ("person", 0, 1)]
    assert locate([("person", "York"), *both[:1] * 3], sample)[-1] == ("location", "New York")


def test_blank_tokens_and_markers_are_where_answers_have_them() -> None:
    sample = sample_of(["", "x<spot>y", " ", "Kyrie"], ["O", "B-person", "I-person", "B-person"])
    assert gold_places(sample) == [("person", 0, 3), ("person", 3, 4)]
    assert score(sample, "person, x< spot >y <spot> person, Kyrie", "offset") == Counts(2, 2, 2)
