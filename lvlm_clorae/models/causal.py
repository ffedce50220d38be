"""A causal language model that sees, as LLaVA does: projected patches in the place of ``<image>`` tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..losses.token_loss import token_loss
from .projector import VisualProjector
from .slots import of_rows, place
from .vision import VisionTower


class VisionCausalConfig(PretrainedConfig):
    """A language model's configuration with the tower and the projector beside it.

    Args:
        text_config: of the language model, with its ``model_type``
        vision: arguments of :class:`VisionTower`
        projector: ``linear`` or ``mlp2x_gelu``
        image_token_id: the token that stands once for every visual token of a picture
        region_token_id: the token that stands for an object region. Neither needs a row of the embedding table.
    """

    model_type = "vision_causal_lm"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers reads it from the class

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision: dict[str, Any] | None = None,
        projector: str = "mlp2x_gelu",
        image_token_id: int = -1,
        region_token_id: int = -2,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.vision = vision
        self.projector = projector
        self.image_token_id, self.region_token_id = image_token_id, region_token_id
        super().__init__(**kwargs)


AutoConfig.register(VisionCausalConfig.model_type, VisionCausalConfig)


class VisionCausalLM(PreTrainedModel, GenerationMixin):
    """Any causal language model of transformers with a frozen vision tower and a projector.

    A row without a picture has no ``<image>`` tokens, and for it the model is exactly its language model.
    """

    config_class = VisionCausalConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True
    fresh_parts: tuple[str, ...] = ()  # names of parts whose weights are in no checkpoint

    def __init__(self, config: VisionCausalConfig) -> None:
        super().__init__(config)
        # The class itself, not from_config, which under ZeRO-3 would partition what is made on the meta device.
        self.language_model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)](config.text_config)
        self.vision_tower = VisionTower(**(config.vision or {"model": "ViT-B-32"}))
        width = self.language_model.get_input_embeddings().embedding_dim
        self.projector = VisualProjector(self.vision_tower.width, width, self.vision_tower.grid, config.projector)
        self._takes = set(inspect.signature(self.language_model.forward).parameters)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """All parts initialise themselves."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        pixel_mask: torch.Tensor | None,
        regions: torch.Tensor | None,
    ) -> torch.Tensor:
        """The language model's input ``[B, S, d]``; arguments as in :meth:`forward`.

        Tower and projector run whatever the rows hold: under ZeRO-3 every rank has to run the same modules.
        """
        rows, size = input_ids.shape[0], self.vision_tower.image_size
        if pixel_values is None:
            pixel_values = torch.zeros(1, 3, size, size, device=input_ids.device)
        at_image = input_ids == self.config.image_token_id
        if pixel_mask is None:
            pixel_mask = at_image.any(1).long()
        if regions is None:
            regions = torch.zeros(rows, 1, 4, device=input_ids.device)
        patches = of_rows(self.vision_tower(pixel_values.to(self.dtype)), pixel_mask)
        visual, region_tokens = self.projector(patches, regions)
        at_region = input_ids == self.config.region_token_id
        text = self.get_input_embeddings()(input_ids.masked_fill(at_image | at_region, 0))
        return place(place(text, at_image, visual), at_region, region_tokens)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Training, or a forward over whole rows.

        Args:
            input_ids: ``[B, S]`` with ``image_token_id`` once for each visual token of the row's picture and
                ``region_token_id`` where a region token stands, in the order of ``regions``
            attention_mask: ``[B, S]``
            pixel_values: ``[I, 3, H, W]``, the pictures of the rows that have one; or ``[B, 3, H, W]``, anything where
                there is none
            pixel_mask: ``[B]``, 1 where there is a picture; by default where ``image_token_id`` stands
            regions: ``[B, R, 4]`` boxes in 0..1
            labels: ``[B, T]``, T <= S, of the last T tokens, -100 where nothing is learnt
            num_items_in_batch: divisor of the summed loss instead of this batch's own number of target tokens

        Returns:
            with ``labels`` the loss, and the logits ``[B, T, vocabulary]`` that foretell them, else of all tokens.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if "position_ids" in self._takes:  # padding on the left must not count
            kwargs.setdefault("position_ids", (attention_mask.cumsum(-1) - 1).clamp(min=0))
        # The vocabulary is wide and prompts are long: logits are made of what foretells a label alone.
        if labels is not None:
            kwargs.setdefault("use_cache", False)
            if "logits_to_keep" in self._takes:
                kwargs["logits_to_keep"] = labels.shape[1] + 1
        embeds = self.embed(input_ids, pixel_values, pixel_mask, regions)
        output = self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        if labels is not None:
            output.logits = output.logits[:, -labels.shape[1] - 1 : -1]
            output.loss = token_loss(output.logits, labels[:, -output.logits.shape[1] :], num_items_in_batch)
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
        """The new token ids ``[B, T]``: the language model's own generate, with its KV cache, from embeddings.

        Rows are padded on the left.
        """
        assert input_ids is not None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.language_model.generation_config = self.generation_config
        embeds = self.embed(input_ids, pixel_values, pixel_mask, regions)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
