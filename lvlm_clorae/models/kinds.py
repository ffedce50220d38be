"""What each token of a batch is: text of the prompt, of the picture, of the answer, or padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KINDS = ("text", "visual", "answer")
"""A token's kind is its place here. ``visual`` are picture and region tokens; other special tokens are text."""
TEXT, VISUAL, ANSWER = range(len(KINDS))
PADDING = -1


def input_kinds(config: Any, batch: Mapping[str, Tensor], length: int) -> Tensor:
    """The kinds ``[B, length]`` of what the encoder reads or, without one, the whole model: prompt and answer.

    A model whose configuration names no token of a picture has no visual tokens in its text.

    Args:
        config: of the model
        batch: what its processor gave for prompts with answers
        length: of the sequence. What it is longer than ``input_ids`` are visual tokens before them, as T5's ``concat``
            puts them there.
    """
    ids = batch["input_ids"]
    kinds = torch.full_like(ids, TEXT)
    for name in ("image_token_id", "region_token_id"):
        slot = getattr(config, name, None)
        if slot is not None:
            kinds = kinds.masked_fill(ids == slot, VISUAL)
    if not getattr(config, "is_encoder_decoder", False):
        answers = answer_kinds(batch)
        before = ids.shape[1] - answers.shape[1]
        kinds = torch.cat([kinds[:, :before], torch.where(answers == ANSWER, ANSWER, kinds[:, before:])], 1)
    kinds = kinds.masked_fill(batch["attention_mask"] == 0, PADDING)
    if length == ids.shape[1]:
        return kinds
    pictures = torch.where(batch["pixel_mask"] == 1, VISUAL, PADDING)
    return torch.cat([pictures.unsqueeze(1).expand(-1, length - ids.shape[1]), kinds], 1)


def answer_kinds(batch: Mapping[str, Tensor]) -> Tensor:
    """The kinds ``[B, T]`` of what a decoder reads: it is told the answer, a token behind the labels."""
    return torch.where(batch["labels"] != -100, ANSWER, PADDING)
