"""Training batches of a causal language model without padding, and with the common prefix of the prompts once.

All samples of a dataset task have the same question and label list in front, so the rows of a micro-batch begin alike.
Causal attention gives them the same hidden states there. So the B rows become one row of N tokens,

    [prefix, own tokens of row 1, ..., own tokens of row B]

for everything that works on tokens alone: embedding, norms, linear layers and their adapters, rotary positions, output
head. Attention (:func:`attention`) sees every row with the prefix in front. Loss and gradient are those of the padded
batch up to rounding; only dropout draws one mask for the prefix instead of B.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA = "sdpa"
PACKED = "sdpa_packed"
"""The attention implementation of a packed model; without ``packed_rows`` it is the ordinary one."""
MODEL_TYPES = frozenset({"gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})
"""Language models whose layers mix tokens in attention alone, and pass it further arguments; each one is tested."""

Packing = dict[str, Tensor]
"""``tokens [N]``: places of the packed tokens in the flattened ``[B, S]``; ``rows [B, L]``: places in the packed row of
each row's own tokens, at the end the last one repeated; ``back [N - P]``: places in the flattened ``[B, L]`` of the
tokens after the prefix of P tokens; ``targets [M]``: places in the packed row whose logits predict ``labels [M]``."""


def common_prefix(rows: Sequence[Tensor], limit: int, unique_ids: Sequence[int]) -> int:
    """Return the number of first tokens, at most ``limit``, that all rows share.

    Args:
        rows: token ids of each row, ``limit`` or more
        unique_ids: tokens that stand for something of the row, such as its image
    """
    heads = torch.stack([row[:limit] for row in rows])
    shared = (heads == heads[0]).all(0) & ~torch.isin(heads[0], torch.tensor(unique_ids, dtype=heads.dtype))
    return int(shared.long().cumprod(0).sum())


def pack(batch: dict[str, Tensor], unique_ids: Sequence[int] = ()) -> Packing:
    """Return where the tokens of a batch are in the packed row.

    Args:
        batch: ``input_ids``, ``attention_mask [B, S]`` and ``labels [B, T]`` of a causal processor: prompts are padded
            on the left, answers on the right, and labels belong to the last T columns
        unique_ids: as for :func:`common_prefix`
    """
    ids, mask, labels = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]
    (B, S), T = ids.shape, labels.shape[1]
    places = torch.arange(B * S).view(B, S)
    prompt = int(mask[:, : S - T].sum(1).min())
    # The last token of a prompt predicts the first label, so it is the row's own
    P = common_prefix([row[kept] for row, kept in zip(ids, mask, strict=True)], max(0, prompt - 1), unique_ids)
    own = [row[kept][P:] for row, kept in zip(places, mask, strict=True)]
    lengths = torch.tensor([len(row) for row in own])
    tokens = torch.cat([places[0][mask[0]][:P], *own])

    columns = torch.arange(int(lengths.max())).expand(B, -1)
    first = P + lengths.cumsum(0) - lengths
    rows = first.unsqueeze(1) + torch.minimum(columns, lengths.unsqueeze(1) - 1)
    back = (columns < lengths.unsqueeze(1)).flatten().nonzero().flatten()

    packed = torch.empty(B * S, dtype=torch.long).scatter_(0, tokens, torch.arange(len(tokens)))
    counted = labels != -100
    targets = packed[places[:, S - T :][counted] - 1]
    return {"tokens": tokens, "rows": rows, "back": back, "targets": targets, "labels": labels[counted]}


def is_packable(language_model: Any) -> bool:
    """Return whether a causal language model of transformers can run packed rows, of any length."""
    config, takes = language_model.config, inspect.signature(language_model.forward).parameters
    attends = config.model_type in MODEL_TYPES and config._attn_implementation in (SDPA, PACKED)
    return attends and not getattr(config, "sliding_window", None) and {"position_ids", "logits_to_keep"} <= set(takes)


def packed_inputs(language_model: Any, embeds: Tensor, packing: Packing) -> dict[str, Any]:
    """Return the arguments of the language model's forward for embeddings ``[B, S, d]``; logits are ``[1, M, V]``."""
    language_model.set_attn_implementation(PACKED)
    rows, back = packing["rows"], packing["back"]
    (B, L), N = rows.shape, len(packing["tokens"])
    P = N - len(back)
    device = embeds.device
    own = (P + torch.arange(L, device=device)).repeat(B)[back]
    # Tokens of a row see the prefix and those before them; repeated ones at its end are seen by none that counts
    mask = torch.cat([torch.ones(L, P, dtype=torch.bool, device=device), causal(L, device)], 1)
    members = torch.zeros(B, N, dtype=torch.bool, device=device).scatter_(1, rows, value=True)
    members[:, :P] = True
    return {
        "inputs_embeds": embeds.flatten(0, 1)[packing["tokens"]].unsqueeze(0),
        "attention_mask": mask[None, None],
        "position_ids": torch.cat([torch.arange(P, device=device), own]).unsqueeze(0),
        "logits_to_keep": packing["targets"],
        "packed_rows": (rows, back),
        "token_rows": members,
    }


def prefix_first(embeds: Tensor, attention_mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Move the first ``length`` valid tokens of each row before its padding, which is on the left.

    Args:
        embeds: ``[B, S, d]``
        attention_mask: ``[B, S]``
    """
    padding = attention_mask.argmax(1, keepdim=True)
    columns = torch.arange(attention_mask.shape[1], device=embeds.device)
    source = torch.where(columns < length + padding, columns - length, columns)
    source = torch.where(columns < length, columns + padding, source)
    return embeds.gather(1, source.unsqueeze(-1).expand_as(embeds)), attention_mask.gather(1, source)


def causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: tuple[Tensor, Tensor] | None = None,
    token_rows: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend over each row of a packed one, ``[1, heads, N, d]``; without ``packed_rows`` over a batch as usual."""
    attend = ALL_ATTENTION_FUNCTIONS[SDPA]
    if packed_rows is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    rows, back = packed_rows
    P = query.shape[2] - len(back)

    def own(x: Tensor) -> Tensor:
        return x[0][:, rows].transpose(0, 1)

    def whole(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :P].expand(len(rows), -1, -1, -1), own(x)], 2)

    found = attend(module, own(query), whole(key), whole(value), attention_mask, **kwargs)[0].flatten(0, 1)[back]
    if P == 0:
        return found.unsqueeze(0), None
    prefix = attend(module, query[:, :, :P], key[:, :, :P], value[:, :, :P], None, **kwargs)[0]
    return torch.cat([prefix, found.unsqueeze(0)], 1), None


AttentionInterface.register(PACKED, attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
