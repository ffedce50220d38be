"""Captions: an empty prompt, and an answer in free text that is its only tuple."""

from __future__ import annotations

from typing import Any

import pytest

from lvlm_clorae.tasks import (
    Counts,
    build_prompt,
    check_sample,
    fit_prompt,
    format_answer,
    gold_tuples,
    parse_answer,
    score_sample,
)
from lvlm_clorae.tasks.schema import CAPTION, SUBTASKS, in_task_order, missing_annotations, subtasks_of

LABELS: dict[str, Any] = {}


def caption(text: Any = "A dog , running <spot> on the beach .", **changes: Any) -> dict[str, Any]:
    sample = {"dataset": "flickr8k", "task": "caption", "text": "", "tokens": [], "image": "dog.jpg", "caption": text}
    return {**sample, **changes}


def test_a_caption_is_a_valid_sample() -> None:
    assert check_sample(caption()) == []
    assert missing_annotations(caption(), [CAPTION]) == []
    assert missing_annotations({}, [CAPTION]) == ["caption"]


@pytest.mark.parametrize("text", [None, "", "  ", 3])
def test_a_caption_without_text_is_invalid(text: object) -> None:
    (problem,) = check_sample(caption(text))
    assert problem.startswith("caption: ")


def test_it_is_no_subtask_of_a_task_of_ones_own() -> None:
    assert subtasks_of("caption") == (CAPTION,)
    assert CAPTION not in subtasks_of("aspects") == SUBTASKS
    assert in_task_order(["caption", "mre"]) == ["mre", "caption"]
    assert "at least one of" in check_sample(caption(task="aspects"))[0]


@pytest.mark.parametrize("text", ["A dog , running <spot> on the beach .", "none", "person, a b", "O1  <event>"])
def test_format_then_parse_gives_the_gold_tuple(text: str) -> None:
    sample = caption(text)
    assert build_prompt(sample, CAPTION, LABELS) == ""
    assert fit_prompt(sample, CAPTION, LABELS, lambda prompt: len(prompt) < 1) == ("", 0)
    answer = format_answer(sample, CAPTION)
    assert parse_answer(answer, CAPTION, LABELS) == gold_tuples(sample, CAPTION)
    assert score_sample(sample, answer, CAPTION, LABELS).counts == Counts(1, 1, 1)
    assert score_sample(sample, "another", CAPTION, LABELS).counts == Counts(0, 1, 1)
