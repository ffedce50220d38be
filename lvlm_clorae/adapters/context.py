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
        self.own: tuple[Tensor, Tensor] | None = None
        self.encoder: tuple[Tensor, Tensor] | None = None
        self._all: tuple[Any, Tensor] | None = None

    def read(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the stack. Masks passed by position are not seen: every token is valid then.

        A packed row ``[1, N, d]`` of B rows (models/packing.py) has ``token_rows``: which tokens a row has, ``[B, N]``.
        """
        own = kwargs.get("token_rows", kwargs.get("attention_mask"))
        if own is None and self.is_decoder and self.context.labels is not None:
            own = self.context.labels != -100
        self.own = _mask_and_number(own)
        self.encoder = _mask_and_number(kwargs.get("encoder_token_rows", kwargs.get("encoder_attention_mask")))

    def valid(self, x: Tensor, reads_encoder: bool) -> Tensor | None:
        """Return True for the valid tokens of x ``[B, S, d]``, ``[B, S]``; None if all are.

        For a packed row it is the ``[B, N]`` of :meth:`read`. A mask of another shape (decoding with a cache, 4-D
        masks) does not describe these tokens: all are valid.
        """
        mask = self.encoder if reads_encoder else self.own
        if mask is not None and x.shape[:-1] in (mask[0].shape, (1, *mask[0].shape[1:])):
            return mask[0].to(x.device)
        return None

    @torch.no_grad()
    def number(self, x: Tensor, valid: Tensor | None, reads_encoder: bool) -> Tensor:
        """Return the number of the tokens of :meth:`valid`, a float scalar; those of a packed row once per row."""
        mask = self.encoder if reads_encoder else self.own
        if valid is not None and mask is not None:
            return mask[1].to(x.device)
        if torch.compiler.is_compiling():
            return torch.full((), x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
        key = x.shape[:-1], x.device
        if self._all is None or self._all[0] != key:  # the same for all layers of the stack
            self._all = key, torch.full((), x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
        return self._all[1]


def _mask_and_number(mask: Any) -> tuple[Tensor, Tensor] | None:
    """Return True for the valid tokens of a mask ``[B, S]`` and their number, a float scalar; None for other masks."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    valid = mask != 0
    return valid, valid.sum().float()


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
