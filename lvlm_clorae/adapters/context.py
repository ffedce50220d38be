"""What the adapted layers must know beside their input: the task, which tokens are valid, and where side losses go.

The base model's signature stays as it is, so hooks read the masks on their way in. Everything here stays until the next
forward (the task: until it is set again), because under activation checkpointing the layers run a second time in
backward, when the caller's frame is gone. So one forward, then its backward: a second forward with another task or mask
before the first one's backward is not supported under checkpointing.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

# The projections of cross-attention that read the encoder's states: ...EncDecAttention.k, ...encoder_attn.v_proj
_READS_ENCODER = re.compile(
    r"(?i)(^|\.)(encdecattention|encoder_attn|cross_?attn|cross_?attention)\.(.*\.)?(k|v|key|value)(_proj)?$"
)


class StackMasks:
    """The padding masks that one stack (an encoder, a decoder, a whole model) was last called with.

    Args:
        is_decoder: a decoder of an encoder-decoder model: where it got no mask, a position is valid whose label is
            counted, since position t predicts label t.
    """

    def __init__(self, context: ForwardContext, is_decoder: bool) -> None:
        self.context, self.is_decoder = context, is_decoder
        self.own: Tensor | None = None
        self.encoder: Tensor | None = None

    def read(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: keyword arguments only; a mask passed by position is not seen, and every token is valid."""
        self.own = kwargs.get("attention_mask")
        if self.own is None and self.is_decoder and self.context.labels is not None:
            self.own = self.context.labels != -100
        self.encoder = kwargs.get("encoder_attention_mask")

    def valid(self, x: Tensor, reads_encoder: bool) -> Tensor | None:
        """True where a token of x ``[B, S, d]`` counts, ``[B, S]``; None where all count.

        A mask of another shape (decoding with a cache, 4-D masks) says nothing about these tokens: all count.
        """
        mask = self.encoder if reads_encoder else self.own
        if not isinstance(mask, Tensor) or mask.shape != x.shape[:-1]:
            return None
        return mask.to(x.device) != 0


class ForwardContext:
    """One an adapted model, shared by its layers."""

    def __init__(self) -> None:
        self.tasks: dict[str, int | Tensor] = {}  # adapter name -> its task index, or an index a row
        self.labels: Tensor | None = None
        self.seen_forward = False  # the model has run since it was wrapped
        self.side_terms: list[tuple[Tensor, Tensor]] = []  # a layer's part of the side loss, its valid tokens
        self.side_without_graph = (
            False  # a layer ran without grad inside a forward that has it: reentrant checkpointing
        )
        self._inside_forward = False
        self._grad_outside = False

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole base model."""
        self.labels = kwargs.get("labels")
        self.side_terms = []
        self.side_without_graph = False
        self.seen_forward = self._inside_forward = True
        self._grad_outside = torch.is_grad_enabled()

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the whole base model, called also when it raised."""
        self._inside_forward = False

    def record(self, term: Tensor | None, tokens: Tensor) -> None:
        """Keep a layer's part of the side loss, of ``tokens`` valid ones; None where the layer ran without grad.

        A recomputation in backward is outside the forward, so it is never counted twice.
        """
        if not self._inside_forward:
            return
        if term is not None:
            self.side_terms.append((term, tokens))
        elif self._grad_outside:
            self.side_without_graph = True

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: no tensors of a graph."""
        return {**self.__dict__, "side_terms": [], "labels": None}


def reads_encoder_states(name: str) -> bool:
    """Whether the module of this dotted name projects the encoder's states inside a decoder's cross-attention."""
    return _READS_ENCODER.search(name) is not None
