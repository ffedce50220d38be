"""Inputs of the adapted layers beside their activations: the task, the padding masks, the auxiliary terms.

The base model's signature stays as it is, so hooks read the masks. Everything is kept until the next forward (the task:
until it is set again), because activation checkpointing runs the layers a second time in backward. Under checkpointing
each forward must therefore be followed by its backward before the next forward.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import AdapterConfig

READS_ENCODER = re.compile(
    r"(?i)(^|\.)(encdecattention|encoder_attn|cross_?attn|cross_?attention)\.(.*\.)?(k|v|key|value)(_proj)?$"
)
"""Names of cross-attention's projections of the encoder's states: ...EncDecAttention.k, ...encoder_attn.v_proj"""


class StackMasks:
    """Padding masks of the last forward of one stack (an encoder, a decoder, a whole model).

    ``is_decoder`` marks the decoder of an encoder-decoder model. Without a mask, its positions with a label are the
    valid ones, since position t predicts label t.
    """

    def __init__(self, context: ForwardContext, is_decoder: bool) -> None:
        self.context, self.is_decoder = context, is_decoder
        self.own: Tensor | None = None
        self.encoder: Tensor | None = None
        self.packed: Tensor | None = None
        self.packed_encoder: Tensor | None = None
        self._kept: dict[object, Tensor | None] = {}  # the same for all layers of the stack

    def read(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the stack. Masks passed by position are not seen: every token is valid then."""
        self.own = kwargs.get("attention_mask")
        self.packed, self.packed_encoder = kwargs.get("token_rows"), kwargs.get("encoder_token_rows")
        if self.own is None and self.is_decoder and self.context.labels is not None:
            self.own = self.context.labels != -100
        self.encoder = kwargs.get("encoder_attention_mask")
        self._kept = {}

    def valid(self, x: Tensor, reads_encoder: bool) -> Tensor | None:
        """Return True for the valid tokens of x ``[B, S, d]``, ``[B, S]``; None if all are.

        A mask of another shape (decoding with a cache, 4-D masks) does not describe these tokens: all are valid. For a
        packed row ``[1, N, d]`` of B rows (models/packing.py) the result says which tokens a row has, ``[B, N]``.
        """
        packed = self.packed_encoder if reads_encoder else self.packed
        if packed is not None and x.shape[:-1] == (1, packed.shape[1]):
            return packed
        mask = self.encoder if reads_encoder else self.own
        if not isinstance(mask, Tensor) or mask.shape != x.shape[:-1]:
            return None
        key = id(mask), x.device
        if key not in self._kept:
            self._kept[key] = mask.to(x.device) != 0
        return self._kept[key]

    def number(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Return the number of valid tokens of x, from the result of :meth:`valid`, a float scalar on its device."""
        key = id(valid), x.shape[:-1], x.device
        found = self._kept.get(key)
        if found is None:
            self._kept[key] = found = count_tokens(x, valid)
        return found


@torch.no_grad()
def count_tokens(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return the number of valid tokens of x ``[B, ..., d_in]``, a float scalar on its device."""
    if valid is not None:
        return valid.sum().float()
    return torch.full((), x.shape[:-1].numel(), dtype=torch.float32, device=x.device)


class AuxTerm(NamedTuple):
    """A layer's contribution to the auxiliary loss: the tensors, the number of valid tokens, the adapter's settings."""

    tensors: tuple[Tensor, ...]
    tokens: Tensor
    config: AdapterConfig


class ForwardContext:
    """State of an adapted model that its layers share."""

    def __init__(self) -> None:
        self.tasks: dict[str, int | Tensor] = {}  # adapter name -> task index, or an index per row
        self.labels: Tensor | None = None
        self.aux_terms: list[AuxTerm] | None = None  # of the last forward, None before the first
        self.aux_without_graph = False  # a layer ran without gradients in a forward with them: reentrant checkpointing
        self._inside_forward = self._grad_outside = False

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole base model."""
        self.labels, self.aux_terms, self.aux_without_graph = kwargs.get("labels"), [], False
        self._inside_forward, self._grad_outside = True, torch.is_grad_enabled()

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the whole base model, also called if it raised."""
        self._inside_forward = False

    def record(self, tensors: tuple[Tensor, ...] | None, tokens: Tensor, config: AdapterConfig) -> None:
        """Keep a layer's auxiliary term (None without gradients), except when backward runs the layer again."""
        if self.aux_terms is None or not self._inside_forward:
            return
        if tensors is not None:
            self.aux_terms.append(AuxTerm(tensors, tokens, config))
        elif self._grad_outside:
            self.aux_without_graph = True

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without tensors of a graph."""
        return {**self.__dict__, "aux_terms": None, "labels": None}
