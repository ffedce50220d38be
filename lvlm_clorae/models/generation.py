"""Generation of answers for a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

from .constrained import Constraint
from .processor import Processor


def choose_tasks(model: Any, rows: Sequence[str], tasks: Sequence[str]) -> bool:
    """Set the task of each row on an adapter with task experts, whose tasks are ``tasks``.

    Returns whether the model is the same for all rows.
    """
    if not hasattr(model, "set_task"):
        return True
    single = len(set(rows)) == 1  # takes the dense path
    model.set_task(rows[0] if single else torch.tensor([tasks.index(task) for task in rows]))
    return single


@torch.no_grad()
def generate_answers(
    model: Any,
    processor: Processor,
    tensors: dict[str, torch.Tensor],
    max_new_tokens: int,
    constraint: Constraint | None = None,
    shared_prefix: int = 0,
    **kwargs: Any,
) -> list[str]:
    """Generate an answer for each row of a batch without answers by greedy decoding, with the task markers restored.

    ``shared_prefix`` is the result of the processor's method of this name, on every rank either 0 or not, and 0 if the
    rows have several tasks; ``kwargs`` are generation settings.
    """
    if shared_prefix:
        kwargs["shared_prefix"] = shared_prefix
    if constraint is not None:
        kwargs["logits_processor"] = LogitsProcessorList([*kwargs.get("logits_processor", ()), constraint])
    tokens = model.generate(**tensors, max_new_tokens=max_new_tokens, do_sample=False, **kwargs)
    if constraint is not None:
        return constraint.answers(tokens)
    return processor.decode(tokens[:, processor.prompt_length(tensors) :])
