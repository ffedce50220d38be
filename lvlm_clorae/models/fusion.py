"""Fusion after the text encoder (``gated``): UMIE's cross-attention from text to image with a similarity gate."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention, T5LayerFF, T5Stack

VISUAL_LAYERS = 2
TEMPERATURE = math.exp(0.5)


class GatedFusion(nn.Module):
    """Add to each text state its cross-attention to the image, scaled by the similarity of image and text.

        visual <- two T5 blocks with a relative position bias of their own, and a layer norm
        update  = feed_forward(cross_attention(text, visual))
        rate    = leaky_relu(exp(0.5) cos(proj_t(mean text), proj_v(mean visual)))      one per row
        fused   = text + rate update

    Source: Sun et al., "UMIE" (AAAI 2024, arXiv 2401.03082) and its code, ZUCC-AI/UMIE ``src/modeling_t5.py``: VStack,
    GateBlock. As there, cross-attention and feed-forward are T5's layers with their residual connections, so that the
    update contains the text too; cross-attention uses no positions; the four projections are linear without bias.

    Differences: the mean of the text is over valid tokens, since with padding a row's gate would depend on its batch.
    UMIE's code applies the leaky ReLU twice, so that a gate that starts below zero hardly gets a gradient. A row
    without an image has rate 0, and its states are exactly those of the text encoder; all modules run for it
    nevertheless, since under ZeRO-3 every rank has to run the same modules.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        config = copy.deepcopy(config)
        config.num_layers, config.is_decoder, config.use_cache = VISUAL_LAYERS, False, False
        self.heads = config.num_heads
        self.visual_encoder = T5Stack(config)
        self.visual_encoder.set_input_embeddings(None)  # it reads embeddings, and a table would never get a gradient
        self.cross_attention = T5LayerCrossAttention(config)
        self.feed_forward = T5LayerFF(config)
        self.proj_t, self.proj_v = _projection(config.d_model), _projection(config.d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize T5's layers by T5's rule, which sets the scale of attention, and the projections by torch's."""
        self.apply(self.visual_encoder._init_weights)
        for layer in (*self.proj_t, *self.proj_v):
            layer.reset_parameters()

    def forward(self, text: Tensor, attention_mask: Tensor, visual: Tensor, pixel_mask: Tensor) -> Tensor:
        """Fuse states ``text [B, S, d]`` and projected patches ``visual [B, P, d]`` to states ``[B, S, d]``.

        The masks are ``[B, S]``, 1 at valid tokens, and ``[B]``, 1 where a row has an image.
        """
        visual = self.visual_encoder(inputs_embeds=visual).last_hidden_state
        # Passed explicitly, since T5 in transformers 5.0 otherwise needs a cache position.
        no_positions = text.new_zeros(1, self.heads, text.shape[1], visual.shape[1])
        update = self.feed_forward(self.cross_attention(text, visual, position_bias=no_positions)[0])
        rate = self.rate(text, attention_mask, visual).masked_fill(pixel_mask == 0, 0)
        return text + rate.to(text.dtype).view(-1, 1, 1) * update.to(text.dtype)

    def rate(self, text: Tensor, attention_mask: Tensor, visual: Tensor) -> Tensor:
        """Compute the gate ``[B]`` in fp32, at most ``exp(0.5)``, from text and encoded visual states."""
        shares = attention_mask / attention_mask.sum(-1, keepdim=True).clamp(min=1)
        mean_text = torch.einsum("bs,bsd->bd", shares.to(text.dtype), text)
        of_text, of_visual = self.proj_t(mean_text), self.proj_v(visual.mean(1))
        return functional.leaky_relu(TEMPERATURE * functional.cosine_similarity(of_text.float(), of_visual.float()))


def _projection(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 384, bias=False), nn.Linear(384, 128, bias=False))
