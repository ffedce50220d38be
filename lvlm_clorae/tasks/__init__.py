"""Sample schema, prompts, answer strings, their parser and the scorer. Pure Python, without torch."""

from lvlm_clorae.tasks.answer import format_answer, parse_answer, parse_with_errors
from lvlm_clorae.tasks.matching import MISSED, SPURIOUS, confusion
from lvlm_clorae.tasks.prompt import build_prompt, fit_prompt, visible
from lvlm_clorae.tasks.schema import EVENT, NONE, REGION, SPOT, SUBTASKS, TASKS, check_sample
from lvlm_clorae.tasks.score import MATCHES, Counts, Scored, gold_tuples, ground, score, score_sample

__all__ = ["EVENT", "MATCHES", "MISSED", "NONE", "REGION", "SPOT", "SPURIOUS", "SUBTASKS", "TASKS", "Counts", "Scored"]
__all__ += ["build_prompt", "check_sample", "confusion", "fit_prompt", "format_answer", "gold_tuples", "ground"]
__all__ += ["parse_answer", "parse_with_errors", "score", "score_sample", "visible"]
