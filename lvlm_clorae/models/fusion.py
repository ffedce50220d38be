"""Fusion after the text encoder (``gated``): UMIE's cross-attention from text to picture behind a similarity gate."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention, T5LayerFF, T5Stack

VISUAL_LAYERS = 2
TEMPERATURE = math.exp(0.5)


class GatedFusion(nn.Module):
    """Text states plus what they see in the picture, by as much as picture and text are alike.

        visual <- two T5 blocks with a relative position bias of their own, and a layer norm
        update  = feed_forward(cross_attention(text, visual))
        rate    = leaky_relu(exp(0.5) cos(proj_t(mean text), proj_v(mean visual)))      one number a row
        fused   = text + rate update

    Source: Sun et al., "UMIE" (AAAI 2024, arXiv 2401.03082) and its code, ZUCC-AI/UMIE ``src/modeling_t5.py``: VStack,
    GateBlock. As there, cross-attention and feed-forward are T5's layers with their residual connections, so that the
    update holds the text too; cross-attention knows no positions; the four projections are linear without bias, which
    is why the mean may be projected instead of every token.

    Otherwise than there:

    - The mean of the text is over valid tokens: over padding too, a row's gate would depend on its batch.
    - One leaky ReLU: UMIE's code applies it twice, and the slope below zero is then 1e-4, next to no gradient for a
      gate that starts there.
    - A row without a picture has rate 0, and its states are exactly those of the text encoder. All modules run all the
      same, on whatever stands for the picture: under ZeRO-3 every rank has to run the same modules.
    """

    def __init__(self, config: T5Config) -> None:
        """
        Args:
            config: of the T5 whose encoder gives the text states; widths, heads, dropout and activation are its
        """
        super().__init__()
        config = copy.deepcopy(config)
        config.num_layers, config.is_decoder, config.use_cache = VISUAL_LAYERS, False, False
        self.heads = config.num_heads
        self.visual_encoder = T5Stack(config)
        self.visual_encoder.set_input_embeddings(None)  # it reads embeddings; a table would never get a gradient
        self.cross_attention = T5LayerCrossAttention(config)
        self.feed_forward = T5LayerFF(config)
        self.proj_t, self.proj_v = _projection(config.d_model), _projection(config.d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights: T5's rule for its layers, whose attention has no other scale, torch's for the projections."""
        self.apply(self.visual_encoder._init_weights)
        for layer in (*self.proj_t, *self.proj_v):
            layer.reset_parameters()

    def forward(
        self, text: torch.Tensor, attention_mask: torch.Tensor, visual: torch.Tensor, pixel_mask: torch.Tensor
    ) -> torch.Tensor:
        """Fuse.

        Args:
            text: ``[B, S, d]`` states of the text encoder
            attention_mask: ``[B, S]``, 1 at valid tokens
            visual: ``[B, P, d]`` projected patches, anything finite where there is no picture
            pixel_mask: ``[B]``, 1 where there is a picture

        Returns:
            ``[B, S, d]``
        """
        visual = self.visual_encoder(inputs_embeds=visual).last_hidden_state
        # Given, for without it the T5 of transformers 5.0 wants to know a cache's position.
        no_positions = text.new_zeros(1, self.heads, text.shape[1], visual.shape[1])
        update = self.feed_forward(self.cross_attention(text, visual, position_bias=no_positions)[0])
        rate = self.rate(text, attention_mask, visual).masked_fill(pixel_mask == 0, 0)
        return text + rate.to(text.dtype).view(-1, 1, 1) * update.to(text.dtype)

    def rate(self, text: torch.Tensor, attention_mask: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """The gate ``[B]`` in fp32, at most ``exp(0.5)``; arguments as in :meth:`forward`, ``visual`` encoded."""
        shares = attention_mask / attention_mask.sum(-1, keepdim=True).clamp(min=1)
        mean_text = torch.einsum("bs,bsd->bd", shares.to(text.dtype), text)
        of_text, of_visual = self.proj_t(mean_text), self.proj_v(visual.mean(1))
        return functional.leaky_relu(TEMPERATURE * functional.cosine_similarity(of_text.float(), of_visual.float()))


def _projection(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 384, bias=False), nn.Linear(384, 128, bias=False))
