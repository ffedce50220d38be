"""Tiny causal language models of every type that may be packed, and a padded batch for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM


def tiny_language_model(model_type: str) -> Any:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        sliding_window=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double()


def padded_batch(seed: int = 0, prefix: int = 7) -> dict[str, Tensor]:
    """Three rows with a common prefix: prompts padded on the left, answers on the right."""
    generator = torch.Generator().manual_seed(seed)
    own, answers = (3, 1, 6), (2, 4, 1)
    head = torch.randint(2, 64, (prefix,), generator=generator)
    ids, mask = torch.zeros(3, 18 + prefix - 7, dtype=torch.long), torch.zeros(3, 18 + prefix - 7, dtype=torch.long)
    labels = torch.full((3, 5), -100)
    for row, (text, answer) in enumerate(zip(own, answers, strict=True)):
        tokens = torch.randint(2, 64, (text + answer,), generator=generator)
        end = ids.shape[1] - 5
        ids[row, end - text - prefix : end + answer] = torch.cat([head, tokens])
        mask[row, end - text - prefix : end + answer] = 1
        labels[row, :answer] = tokens[text:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
