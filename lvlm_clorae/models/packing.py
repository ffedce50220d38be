"""Training batches without padding, and with the common prefix of causal prompts once.

The B rows of a batch become one row of N tokens for everything that works on tokens alone: embedding, norms, linear
layers and their adapters, rotary positions, output head. Attention (:func:`attention`) sees the rows. In a causal model
the rows of a dataset task begin alike, with the question and the label list, and have the same hidden states there:

    [prefix of P tokens, own tokens of row 1, ..., own tokens of row B]

Loss and gradient are those of the padded batch up to rounding; only dropout draws one mask for the prefix instead of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA = "sdpa"
PACKED = "sdpa_packed"
"""The attention implementation of a packed model; without ``packed_rows`` it is the ordinary one."""
MODEL_TYPES = frozenset({"gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})
"""Causal language models whose layers mix tokens in attention alone, and pass it further arguments; all are tested."""

Packing = dict[str, Tensor]
"""The fields of a :class:`PackedRows`, and what else the forward of a model needs."""


class PackedRows(NamedTuple):
    """Where the tokens of a batch ``[B, S]`` are in the packed row.

    Args:
        tokens: places of the packed tokens in the flattened batch, ``[N]``
        rows: places in the packed row of each row's own tokens, ``[B, L]``; any place beyond its end
        back: places in the flattened ``[B, L]`` of the tokens after the prefix, ``[N - P]``
    """

    tokens: Tensor
    rows: Tensor
    back: Tensor

    @property
    def prefix(self) -> int:
        """The number P of tokens that all rows share."""
        return len(self.tokens) - len(self.back)

    @property
    def valid(self) -> Tensor:
        """True where :attr:`rows` has an own token, ``[B, L]``."""
        return torch.zeros_like(self.rows, dtype=torch.bool).flatten().index_fill(0, self.back, True).view_as(self.rows)

    @property
    def members(self) -> Tensor:
        """True where a packed token is one of the row, ``[B, N]``."""
        B, L = self.rows.shape
        own = (self.back // L).unsqueeze(0) == torch.arange(B, device=self.back.device).unsqueeze(1)
        return torch.cat([own.new_ones(B, self.prefix), own], 1)

    @property
    def positions(self) -> Tensor:
        """The position of each packed token in its row, ``[N]``."""
        P, L = self.prefix, self.rows.shape[1]
        return torch.cat([torch.arange(P, device=self.back.device), P + self.back % L])

    @property
    def causal_mask(self) -> Tensor:
        """True where a row's own token sees the prefix or an own one, ``[1, 1, L, P + L]``.

        What is beyond a row's end follows its tokens, so none of them sees it.
        """
        L, device = self.rows.shape[1], self.rows.device
        own = torch.ones(L, L, dtype=torch.bool, device=device).tril()
        return torch.cat([own.new_ones(L, self.prefix), own], 1)[None, None]

    def pack(self, x: Tensor) -> Tensor:
        """Return the tokens of ``[B, S, ...]`` as ``[1, N, ...]``."""
        return x.flatten(0, 1).index_select(0, self.tokens).unsqueeze(0)


def pack_rows(mask: Tensor, prefix: int = 0) -> PackedRows:
    """Pack the tokens where ``mask [B, S]`` is not 0, of which the first ``prefix`` are the same in all rows."""
    B, S = mask.shape
    places = torch.arange(B * S).view(B, S)
    found = [row[kept] for row, kept in zip(places, mask != 0, strict=True)]
    own = [row[prefix:] for row in found]
    lengths = torch.tensor([len(row) for row in own])
    columns = torch.arange(int(lengths.max())).expand(B, -1)
    first = prefix + lengths.cumsum(0) - lengths
    inside = columns < lengths.unsqueeze(1)
    rows = torch.where(inside, first.unsqueeze(1) + columns, 0)
    return PackedRows(torch.cat([found[0][:prefix], *own]), rows, inside.flatten().nonzero().flatten())


def packed_rows(packing: Packing, prefix: str = "") -> PackedRows:
    """Return the rows of a packing whose names begin with ``prefix``."""
    return PackedRows(*(packing[prefix + name] for name in PackedRows._fields))


def common_prefix(ids: Tensor, mask: Tensor, limit: int, unique_ids: Sequence[int]) -> int:
    """Return the number of first tokens, at most ``limit``, that are the same in all rows.

    Args:
        ids, mask: ``[B, S]``, with ``limit`` or more valid tokens in each row
        unique_ids: tokens that stand for something of the row, such as its image
    """
    heads = torch.stack([row[kept][:limit] for row, kept in zip(ids, mask != 0, strict=True)])
    shared = (heads == heads[0]).all(0) & ~torch.isin(heads[0], torch.tensor(unique_ids, dtype=heads.dtype))
    return int(shared.long().cumprod(0).sum())


def pack_causal(batch: dict[str, Tensor], unique_ids: Sequence[int] = ()) -> Packing:
    """Return a :class:`PackedRows`, ``targets [M]``, the places whose logits predict a label, and ``labels [M]``.

    Args:
        batch: ``input_ids``, ``attention_mask [B, S]`` and ``labels [B, T]`` of a causal processor: prompts are padded
            on the left, answers on the right, and labels belong to the last T columns
        unique_ids: as for :func:`common_prefix`
    """
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    before = ids.shape[1] - labels.shape[1]
    # The last token of a prompt predicts the first label, so it is the row's own
    shortest = int(mask[:, :before].sum(1).min())
    packed = pack_rows(mask, common_prefix(ids, mask, max(0, shortest - 1), unique_ids))
    place = torch.empty(ids.numel(), dtype=torch.long).scatter_(0, packed.tokens, torch.arange(len(packed.tokens)))
    counted = torch.nn.functional.pad(labels != -100, (before, 0)).flatten().nonzero().flatten()
    return {**packed._asdict(), "targets": place[counted - 1], "labels": labels[labels != -100]}


def is_packable(language_model: Any) -> bool:
    """Return whether a causal language model of transformers can run packed rows."""
    config = language_model.config
    attends = config.model_type in MODEL_TYPES and config._attn_implementation in (SDPA, PACKED)
    return attends and not getattr(config, "sliding_window", None)


def packed_inputs(language_model: Any, embeds: Tensor, packing: Packing) -> dict[str, Any]:
    """Return the arguments of the language model's forward for embeddings ``[B, S, d]``; logits are ``[1, M, V]``."""
    language_model.set_attn_implementation(PACKED)
    packed = packed_rows(packing)
    return {
        "inputs_embeds": packed.pack(embeds),
        "attention_mask": packed.causal_mask,
        "position_ids": packed.positions.unsqueeze(0),
        "logits_to_keep": packing["targets"],
        "packed_rows": packed,
        "token_rows": packed.members,
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


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    encoder_rows: PackedRows | None = None,
    token_rows: Tensor | None = None,
    encoder_token_rows: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend within each row of a packed one, ``[1, heads, N, d]``; without ``packed_rows`` over a batch as usual.

    A module with ``reads_encoder`` has the keys and values of ``encoder_rows``; its position bias, which is zero and of
    the packed shape, is left out.
    """
    attend = ALL_ATTENTION_FUNCTIONS[SDPA]
    if packed_rows is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    keys, P, bias = packed_rows, packed_rows.prefix, kwargs.get("position_bias")
    if getattr(module, "reads_encoder", False) and encoder_rows is not None:
        keys, kwargs["position_bias"] = encoder_rows, None
    elif bias is not None and attention_mask is not None:
        attention_mask, kwargs["position_bias"] = _masked(bias, attention_mask), None

    def own(x: Tensor, packed: PackedRows) -> Tensor:
        return x[0].index_select(1, packed.rows.flatten()).unflatten(1, packed.rows.shape).transpose(0, 1)

    def whole(x: Tensor) -> Tensor:
        found = own(x, keys)
        return torch.cat([x[:, :, :P].expand(len(found), -1, -1, -1), found], 2) if P else found

    rows, _ = attend(module, own(query, packed_rows), whole(key), whole(value), attention_mask, **kwargs)
    found = rows.flatten(0, 1).index_select(0, packed_rows.back).unsqueeze(0)
    if P:
        prefix, _ = attend(module, query[:, :, :P], key[:, :, :P], value[:, :, :P], None, **kwargs)
        found = torch.cat([prefix, found], 1)
    return found, None


def _masked(bias: Tensor, mask: Tensor) -> Tensor:
    """Return T5's position bias, the lowest number where ``mask`` is False: one ``[B, heads, L, L]`` for all layers.

    transformers makes one in each layer. It is kept with the bias.
    """
    kept: Any = getattr(bias, "masked", None)
    if kept is None or kept[0] is not mask:
        kept = bias.masked = mask, torch.where(mask, bias, torch.finfo(bias.dtype).min)  # type: ignore[attr-defined]
    return kept[1]


AttentionInterface.register(PACKED, attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
