"""Text in, tuples out: the sample's schema, prompts, answer strings, their parser and the scorer. Pure Python."""

from __future__ import annotations

from lvlm_clorae.tasks.answer import Parsed, format_answer, parse_answer, parse_with_errors
from lvlm_clorae.tasks.boxes import iou
from lvlm_clorae.tasks.confusion import MISSED, SPURIOUS, confusion
from lvlm_clorae.tasks.prompt import build_prompt
from lvlm_clorae.tasks.schema import EVENT, NONE, REGION, SPOT, SUBTASKS, TASKS, Task, check_sample
from lvlm_clorae.tasks.score import MATCHES, Counts, Scored, gold_tuples, ground, score, score_sample

__all__ = [
    "EVENT",
    "MATCHES",
    "MISSED",
    "NONE",
    "REGION",
    "SPOT",
    "SPURIOUS",
    "SUBTASKS",
    "TASKS",
    "Counts",
    "Parsed",
    "Scored",
    "Task",
    "build_prompt",
    "check_sample",
    "confusion",
    "format_answer",
    "gold_tuples",
    "ground",
    "iou",
    "parse_answer",
    "parse_with_errors",
    "score",
    "score_sample",
]
