"""Answers of a model to a batch of its processor."""

from __future__ import annotations

from typing import Any

import torch

from .processor import Processor


@torch.no_grad()
def generate_answers(
    model: Any, processor: Processor, tensors: dict[str, torch.Tensor], max_new_tokens: int, **kwargs: Any
) -> list[str]:
    """Greedily generated answers, one a row, the task markers back in place.

    Args:
        tensors: what the processor gave for prompts without answers, on the model's device
        kwargs: of ``generate``, as ``synced_gpus`` under ZeRO-3
    """
    tokens = model.generate(**tensors, max_new_tokens=max_new_tokens, do_sample=False, **kwargs)
    return processor.decode(tokens[:, processor.echoed(tensors) :])
