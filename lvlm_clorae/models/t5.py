"""FLAN-T5 that sees: visual tokens before the embedded text in the encoder (``concat``, the paper's Figure 3), or one
fusion after it (``gated``, UMIE's)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from ..losses.token_loss import token_loss
from .fusion import GatedFusion
from .projector import VisualProjector
from .slots import of_rows, place
from .vision import VisionTower


class VisionT5Config(T5Config):
    """A T5 configuration plus the tower, the projector and the fusion.

    Args:
        vision: arguments of :class:`VisionTower`; by default open_clip's ViT-B-32.
        projector: ``linear`` or ``mlp2x_gelu``.
        region_token_id: the token whose embedding is replaced by a region's; by default T5's ``<extra_id_99>``.
        fusion: ``concat`` or ``gated``
    """

    model_type = "vision_t5"

    vision: dict[str, Any] | None = None
    projector: str = "mlp2x_gelu"
    region_token_id: int = 32000
    fusion: str = "concat"


AutoConfig.register(VisionT5Config.model_type, VisionT5Config)


# transformers ties T5's output embedding in any case, and unties it where the files hold two different ones. Under
# ZeRO-3 it cannot compare them, and FLAN-T5's would be lost.
_TIED_INPUTS = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")


def has_own_head(config: T5Config) -> bool:
    """Whether the output embedding is a weight of its own, as in T5 1.1 and FLAN-T5."""
    return not getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)


class OwnHeadT5(T5ForConditionalGeneration):
    """T5 with an output embedding of its own, to be loaded from a checkpoint that has one."""

    _tied_weights_keys = _TIED_INPUTS


class VisionT5(T5ForConditionalGeneration):
    """T5 with a frozen vision tower and a projector.

    With ``concat`` the visual tokens stand before the text. T5 knows positions only as differences, so the text's own
    position bias is that of the text alone; where a sample has no picture its visual tokens are masked and the model is
    exactly T5. With ``gated`` the encoder reads text alone and :class:`GatedFusion` adds the picture to its states.
    Region tokens stand in the text either way.

    Raises:
        ValueError: the configuration's ``fusion`` or ``projector`` is unknown.
    """

    config_class = VisionT5Config
    fresh_parts: tuple[str, ...] = ()  # names of parts whose weights are in no checkpoint

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        return _TIED_INPUTS if has_own_head(self.config) else T5ForConditionalGeneration._tied_weights_keys

    def __init__(self, config: VisionT5Config) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(**(config.vision or {"model": "ViT-B-32"}))
        self.projector = VisualProjector(
            self.vision_tower.width, config.d_model, self.vision_tower.grid, config.projector
        )
        if config.fusion not in ("concat", "gated"):
            raise ValueError(f'fusion must be "concat" or "gated", not "{config.fusion}"')
        self.fusion = GatedFusion(config) if config.fusion == "gated" else None

    def _init_weights(self, module: torch.nn.Module) -> None:
        # The tower and the projector initialise themselves; transformers' rule is for T5's own parts.
        if module.__class__.__module__.startswith("transformers.models.t5"):
            super()._init_weights(module)
        elif isinstance(module, GatedFusion):  # a checkpoint may be without it
            module.reset_parameters()

    def _initialize_weights(self, module: torch.nn.Module, is_custom_code: bool = False) -> None:
        # For classes that are not its own, transformers takes a module without direct parameters for initialised.
        super()._initialize_weights(module)

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, pixel_mask: torch.Tensor, regions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and picture in the embedding space; arguments as in :meth:`encode`.

        Returns:
            text ``[B, S, d_model]`` with region tokens in their slots, and visual tokens ``[B, P, d_model]``.
        """
        patches = of_rows(self.vision_tower(pixel_values.to(self.dtype)), pixel_mask)
        visual, region_tokens = self.projector(patches, regions)
        text = place(self.shared(input_ids), input_ids == self.config.region_token_id, region_tokens)
        return text, visual.to(text.dtype)

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder reads.

        What is absent is put by blanks: every rank always runs the tower, the projector and the fusion.

        Args:
            input_ids: ``[B, S]`` with ``region_token_id`` where a region token stands, in the order of ``regions``
            attention_mask: ``[B, S]``; by default every token is valid
            pixel_values: ``[I, 3, H, W]``, the pictures of the rows that have one; or ``[B, 3, H, W]``, anything where
                there is none
            pixel_mask: ``[B]``, 1 where there is a picture; by default everywhere if there are ``pixel_values``
            regions: ``[B, R, 4]`` boxes in 0..1

        Returns:
            states ``[B, L, d_model]`` and their mask ``[B, L]``; L is P + S with ``concat`` and S with ``gated``.
        """
        rows, size = input_ids.shape[0], self.vision_tower.image_size
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if pixel_values is None:
            pixel_values = torch.zeros(1, 3, size, size, device=input_ids.device)
            pixel_mask = input_ids.new_zeros(rows)
        if pixel_mask is None:
            pixel_mask = input_ids.new_ones(rows)
        if regions is None:
            regions = torch.zeros(rows, 1, 4, device=input_ids.device)
        text, visual = self.embed(input_ids, pixel_values, pixel_mask, regions)
        if self.fusion is not None:
            states = self.encoder(inputs_embeds=text, attention_mask=attention_mask).last_hidden_state
            return self.fusion(states, attention_mask, visual, pixel_mask), attention_mask
        visual_mask = pixel_mask.to(attention_mask.dtype).unsqueeze(-1).expand(-1, visual.shape[1])
        mask = torch.cat([visual_mask, attention_mask], 1)
        return self.encoder(inputs_embeds=torch.cat([visual, text], 1), attention_mask=mask).last_hidden_state, mask

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Training and, with ``encoder_outputs``, one step of generation.

        Args:
            input_ids, attention_mask, pixel_values, pixel_mask, regions: see :meth:`encode`
            labels: ``[B, T]`` with -100 at padding
            encoder_outputs: what the encoder gave for this batch; ``attention_mask`` is then that of :meth:`encode`
            num_items_in_batch: divisor of the summed loss instead of this batch's own number of target tokens
        """
        if encoder_outputs is None:
            assert input_ids is not None
            states, attention_mask = self.encode(input_ids, attention_mask, pixel_values, pixel_mask, regions)
            encoder_outputs = BaseModelOutput(last_hidden_state=states)
        if labels is not None:
            kwargs["decoder_input_ids"] = self._shift_right(labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = (labels != -100).long()
        output = super().forward(
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            decoder_attention_mask=decoder_attention_mask,
            **kwargs,
        )
        if labels is not None:
            output.loss = token_loss(output.logits, labels, num_items_in_batch)
        return output

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids ``[B, T]``: transformers' generate over the encoder's output for text and picture."""
        assert input_ids is not None
        states, mask = self.encode(input_ids, attention_mask, pixel_values, pixel_mask, regions)
        encoder_outputs = BaseModelOutput(last_hidden_state=states)
        return super().generate(encoder_outputs=encoder_outputs, attention_mask=mask, **kwargs)
