"""Greedy decoding of a batch whose rows begin alike and end at different times.

The common prefix is computed once, and rows that have ended leave the batch: else one answer that does not end costs as
much as if none did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .constrained import Constraint
from .packing import prefix_first


def decode(
    language_model: Any,
    embeds: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    shared_prefix: int = 0,
    constraint: Constraint | None = None,
    rows_may_leave: bool = True,
    any_rank: Callable[[bool], bool] = bool,
) -> Tensor:
    """Return the new tokens ``[B, max_new_tokens]``, filled up with the padding token, as ``generate`` finds them.

    Args:
        language_model: a causal language model for which :func:`is_packable` holds, with greedy generation settings
        embeds: prompts ``[B, S, d]``, padded on the left
        mask: 1 at the tokens of the prompts, ``[B, S]``
        shared_prefix: number of first tokens that are the same in all rows
        constraint: the answers allowed for the rows
        rows_may_leave: False if the model is not the same for all rows
        any_rank: whether a flag is set on any of the ranks that must do the same number of forwards
    """
    settings, B = language_model.generation_config, len(mask)
    takes = inspect.signature(language_model.forward).parameters
    cache_name = "cache" if "cache" in takes else "past_key_values"  # transformers 5.24 renames it
    how: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
    ends = torch.tensor(settings.eos_token_id, device=mask.device).flatten()
    found = mask.new_full((B, max_new_tokens), settings.pad_token_id)
    rows = torch.arange(B, device=mask.device)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    if shared_prefix:
        embeds, mask = prefix_first(embeds, mask, shared_prefix)
        how[cache_name] = getattr(language_model(inputs_embeds=embeds[:1, :shared_prefix], **how), cache_name)
        how[cache_name].batch_repeat_interleave(B)
    new = {"inputs_embeds": embeds[:, shared_prefix:]}
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared_prefix:]
    for place in range(max_new_tokens):
        output = language_model(**new, attention_mask=mask, position_ids=positions, **how)
        cache = how[cache_name] = getattr(output, cache_name)
        scores = output.logits[:, -1].float()
        if place < (settings.min_new_tokens or 0):
            scores[:, ends] = -torch.inf
        if constraint is not None:
            scores = constraint(found[rows, :place], scores)
        tokens = scores.argmax(-1).masked_fill(ended, settings.pad_token_id)
        found[rows, place] = tokens
        ended |= torch.isin(tokens, ends)
        left = len(rows) - int(ended.sum())
        if not any_rank(left > 0):
            break
        positions = positions[:, -1:] + 1
        if rows_may_leave and 0 < left <= len(rows) // 2:
            kept = (~ended).nonzero().flatten()
            cache.batch_select_indices(kept)
            rows, ended, tokens, mask, positions = (x[kept] for x in (rows, ended, tokens, mask, positions))
            if constraint is not None:
                constraint.keep(kept.tolist())
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        new = {"input_ids": tokens.unsqueeze(1)}
    return found
