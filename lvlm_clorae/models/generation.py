"""Answers of a model to a batch of its processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

from .constrained import Constraint
from .processor import Processor


def choose_tasks(model: Any, rows: Sequence[str], tasks: Sequence[str]) -> None:
    """Tell an adapter that has ``tasks``, in its order, the task of each row; rows of one task are routed densely.

    Nothing is told a model that knows no tasks.
    """
    if hasattr(model, "set_task"):
        alike = len(set(rows)) == 1
        model.set_task(rows[0] if alike else torch.tensor([tasks.index(task) for task in rows]))


@torch.no_grad()
def generate_answers(
    model: Any,
    processor: Processor,
    tensors: dict[str, torch.Tensor],
    max_new_tokens: int,
    constraint: Constraint | None = None,
    **kwargs: Any,
) -> list[str]:
    """Greedily generated answers, one a row, the task markers back in place.

    Args:
        tensors: what the processor gave for prompts without answers, on the model's device
        constraint: of the samples of these rows, where their answers are to be constrained
        kwargs: of ``generate``, as ``synced_gpus`` under ZeRO-3
    """
    if constraint is not None:
        kwargs["logits_processor"] = LogitsProcessorList([*kwargs.get("logits_processor", ()), constraint])
    tokens = model.generate(**tensors, max_new_tokens=max_new_tokens, do_sample=False, **kwargs)
    if constraint is not None:
        return constraint.answers(tokens)
    return processor.decode(tokens[:, processor.echoed(tensors) :])
