"""FLAN-T5 that sees: visual tokens before the embedded text in the encoder (``concat``, the paper's Figure 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .projector import VisualProjector
from .vision import VisionTower


class VisionT5Config(T5Config):
    """A T5 configuration plus the tower and the projector.

    Args:
        vision: arguments of :class:`VisionTower`; by default open_clip's ViT-B-32.
        projector: ``linear`` or ``mlp2x_gelu``.
        region_token_id: the token whose embedding is replaced by a region's; by default T5's ``<extra_id_99>``.
    """

    model_type = "vision_t5"

    vision: dict[str, Any] | None = None
    projector: str = "mlp2x_gelu"
    region_token_id: int = 32000


AutoConfig.register(VisionT5Config.model_type, VisionT5Config)


class VisionT5(T5ForConditionalGeneration):
    """T5 with a frozen vision tower and a projector.

    The visual tokens stand before the text. T5 knows positions only as differences, so the text's own position bias is
    that of the text alone; where a sample has no picture its visual tokens are masked and the model is exactly T5.
    """

    config_class = VisionT5Config

    def __init__(self, config: VisionT5Config) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(**(config.vision or {"model": "ViT-B-32"}))
        self.projector = VisualProjector(
            self.vision_tower.width, config.d_model, self.vision_tower.grid, config.projector
        )

    def _init_weights(self, module: torch.nn.Module) -> None:
        # The tower and the projector initialise themselves; transformers' rule is for T5's own parts.
        if module.__class__.__module__.startswith("transformers.models.t5"):
            super()._init_weights(module)

    def embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor,
        regions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's input.

        Args:
            input_ids: ``[B, S]`` with ``region_token_id`` where a region token stands, in the order of ``regions``
            attention_mask: ``[B, S]``
            pixel_values: ``[B, 3, H, W]``, anything where there is no picture
            pixel_mask: ``[B]``, 1 where there is a picture
            regions: ``[B, R, 4]`` boxes in 0..1

        Returns:
            embeddings ``[B, P + S, d_model]`` and attention mask ``[B, P + S]``.
        """
        visual, region_tokens = self.projector(self.vision_tower(pixel_values.to(self.dtype)), regions)
        text = self.shared(input_ids)
        slots = input_ids == self.config.region_token_id
        order = (slots.cumsum(-1) - 1).clamp(min=0, max=regions.shape[1] - 1)
        at_slots = region_tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, text.shape[-1]))
        text = torch.where(slots.unsqueeze(-1), at_slots.to(text.dtype), text)
        visual_mask = pixel_mask.to(attention_mask.dtype).unsqueeze(-1).expand(-1, visual.shape[1])
        return torch.cat([visual.to(text.dtype), text], 1), torch.cat([visual_mask, attention_mask], 1)

    def _with_pictures(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        pixel_mask: torch.Tensor | None,
        regions: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`embed` with blanks for what is absent: every rank always runs the tower and the projector."""
        rows, size = input_ids.shape[0], self.vision_tower.image_size
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if pixel_values is None:
            pixel_values = torch.zeros(rows, 3, size, size, device=input_ids.device)
            pixel_mask = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
        if pixel_mask is None:
            pixel_mask = torch.ones(rows, dtype=torch.long, device=input_ids.device)
        if regions is None:
            regions = torch.zeros(rows, 1, 4, device=input_ids.device)
        return self.embed(input_ids, attention_mask, pixel_values, pixel_mask, regions)

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
            input_ids, attention_mask, pixel_values, pixel_mask, regions: see :meth:`embed`
            labels: ``[B, T]`` with -100 at padding
            encoder_outputs: what the encoder gave for this batch; ``attention_mask`` then covers visual tokens too
            num_items_in_batch: divisor of the summed loss instead of this batch's own number of target tokens
        """
        if encoder_outputs is None:
            assert input_ids is not None
            embeds, attention_mask = self._with_pictures(input_ids, attention_mask, pixel_values, pixel_mask, regions)
            encoder_outputs = self.encoder(inputs_embeds=embeds, attention_mask=attention_mask)
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
            total = functional.cross_entropy(
                output.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            output.loss = total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
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
        embeds, mask = self._with_pictures(input_ids, attention_mask, pixel_values, pixel_mask, regions)
        encoder_outputs = self.encoder(inputs_embeds=embeds, attention_mask=mask)
        return super().generate(encoder_outputs=encoder_outputs, attention_mask=mask, **kwargs)
