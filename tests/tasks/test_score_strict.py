"""Scores of match "strict": positions of triggers and arguments, and the very object of a visual argument."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

from lvlm_clorae.tasks import MATCHES, Counts, score_sample
from lvlm_clorae.tasks.score import gold_spans, locate_events
from lvlm_clorae.training.config import TrainConfig
from tests.helpers.task_samples import BOXES, LABELS

TOKENS = ["troops", "attack", "troops", ";", "attack", "kills", "civilians"]


def sample(*events: tuple[str, Any, list[tuple[str, Any]]]) -> dict[str, Any]:
    def mention(span: tuple[int, int]) -> dict[str, Any]:
        return {"text": " ".join(TOKENS[slice(*span)]), "span": list(span)}

    built = [
        {
            "type": label,
            "trigger": span and mention(span),
            "arguments": [
                {"role": role, **({"object": filler} if isinstance(filler, str) else mention(filler))}
                for role, filler in arguments
            ],
        }
        for label, span, arguments in events
    ]
    objects = [{"id": name, "box": list(box), "label": ""} for name, box in {**BOXES, "O3": (0, 0, 10, 9)}.items()]
    return {"task": "mee", "text": " ".join(TOKENS), "tokens": TOKENS, "objects": objects, "events": built}


@pytest.mark.parametrize(
    ("subtask", "answer", "exact", "strict"),
    [
        ("trigger", "attack, attack", 1, 0),  # the first occurrence is meant, the second is gold
        ("trigger", "attack, attack <spot> attack, attack", 1, 1),
        ("trigger", "meet", 1, 1),
        ("trigger", "attack, attack kills", 0, 0),
        ("argument", "attack <spot> attacker, troops", 1, 1),
        ("argument", "attack <spot> target, civilians", 1, 1),
        ("argument", "attack <spot> target, kills civilians", 0, 0),  # no credit for the head word
        ("argument", "attack <spot> target, O1", 1, 1),
        ("argument", "attack <spot> target, O3", 1, 0),  # another object whose box overlaps by 90 %
        ("argument", "attack <spot> place, troops", 1, 0),
    ],
)
def test_positions_and_objects(subtask: str, answer: str, exact: int, strict: int) -> None:
    arguments: list[tuple[str, Any]] = [("attacker", (0, 1)), ("target", (6, 7)), ("target", "O1"), ("place", (2, 3))]
    item = sample(("attack", (4, 5), arguments), ("meet", None, []))
    found = {m: score_sample(item, answer, subtask, LABELS[subtask], m).counts for m in ("exact", "strict")}
    assert (found["exact"].tp, found["strict"].tp) == (exact, strict)
    assert found["strict"].gold == found["exact"].gold
    assert found["strict"].predicted == found["exact"].predicted


def test_labels_are_located_on_their_own() -> None:
    item = sample(("attack", (1, 2), [("attacker", (0, 1))]), ("meet", (1, 2), [("attacker", (0, 1))]))
    answer = "attack <spot> attacker, troops <event> meet <spot> attacker, troops"
    assert score_sample(item, answer, "argument", LABELS["argument"], "strict").counts == Counts(2, 2, 2)
    both = score_sample(item, "attack, attack <spot> meet, attack", "trigger", LABELS["trigger"], "strict")
    assert both.counts == Counts(2, 2, 2)


def test_further_mentions_are_at_the_first_occurrence() -> None:
    item = sample(("attack", (1, 2), [("attacker", (5, 6))]), ("attack", (4, 5), [("attacker", (5, 6))]))
    mentions = [("attack", "attacker", "kills")] * 2
    assert locate_events(mentions, "argument", item) == gold_spans(item, "argument")
    assert locate_events([("attack", "x", "away")], "argument", item) == [(("attack", "x"), "away")]


def test_training_accepts_every_match() -> None:
    assert set(get_args(get_type_hints(TrainConfig)["match"])) == set(MATCHES)
