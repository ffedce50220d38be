"""Generation of answers for a batch."""

from collections.abc import Callable, Sequence
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
    batch: dict[str, torch.Tensor],
    max_new_tokens: int,
    device: torch.device | str = "cpu",
    constraint: Constraint | None = None,
    same_model: bool = True,
    any_rank: Callable[[bool], bool] | None = None,
    **kwargs: Any,
) -> list[str]:
    """Generate an answer for each row of a batch without answers by greedy decoding, with the task markers restored.

    Args:
        batch: the processor's tensors on the CPU
        device: that of the model
        constraint: the answers allowed for the rows
        same_model: whether the model is the same for all rows (:func:`choose_tasks`)
        any_rank: whether a flag is set on any rank, where ranks must do the same number of forwards
        kwargs: further settings of the model's ``generate``
    """
    tensors = {name: tensor.to(device) for name, tensor in batch.items()}
    if not kwargs and getattr(model, "is_packable", False) and hasattr(model, "decode"):
        prefix = processor.shared_prefix(batch) if same_model else 0
        if any_rank and any_rank(prefix == 0):
            prefix = 0
        how = {"constraint": constraint, "rows_may_leave": same_model, "any_rank": any_rank or bool}
        tokens = model.decode(tensors, max_new_tokens, shared_prefix=prefix, **how)
    else:
        if constraint is not None:
            kwargs["logits_processor"] = LogitsProcessorList([*kwargs.get("logits_processor", ()), constraint])
        how = {"do_sample": False, "synced_gpus": any_rank is not None}
        tokens = model.generate(**tensors, max_new_tokens=max_new_tokens, **how, **kwargs)
        tokens = tokens[:, processor.prompt_length(tensors) :] if constraint is None else tokens
    return processor.decode(tokens) if constraint is None else constraint.answers(tokens)
