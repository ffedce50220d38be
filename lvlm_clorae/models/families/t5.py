"""The T5 family: T5 and FLAN-T5 with a vision tower, with visual tokens before the text (``concat``, the paper's
Figure 3) or one fusion after the text encoder (``gated``, UMIE's)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5Attention

from ...errors import UserError
from ...losses.token_loss import token_loss
from ...tasks.schema import EVENT, REGION, SPOT
from ..fusion import GatedFusion
from ..packing import PACKED, SDPA, PackedRows, Packing, pack_rows, packed_rows
from ..processor import Batch, ImageTransform, Lengths, Processor, Texts, TowerProcessor, one_line, pad
from ..projector import IMAGE_INPUTS, VisualProjector, check_text_only, project_images, scatter_tokens
from ..vision import VisionTower
from . import Family, LoadOptions, Source, complete_model

# T5's vocabulary has no "<", but it has sentinels that fine-tuning does not use otherwise.
MARKERS = {SPOT: "<extra_id_0>", EVENT: "<extra_id_1>", REGION: "<extra_id_99>"}


class VisionT5Config(T5Config):
    """A T5 configuration plus the arguments of :class:`VisionTower`, None for text only, and other settings."""

    model_type = "vision_t5"

    vision: dict[str, Any] | None = None
    projector: str = "mlp2x_gelu"
    region_token_id: int = 32000
    fusion: str = "concat"


AutoConfig.register(VisionT5Config.model_type, VisionT5Config)


# transformers ties T5's output embedding and unties it where a checkpoint has two different tensors. Under ZeRO-3
# it cannot compare them, and FLAN-T5's own output embedding would be lost.
_TIED_INPUTS = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")


def has_own_head(config: T5Config) -> bool:
    """Return whether the output embedding is a separate weight, as in T5 1.1 and FLAN-T5."""
    return not getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)


class UntiedT5(T5ForConditionalGeneration):
    """T5 with a separate output embedding, to load a checkpoint that has one."""

    _tied_weights_keys = _TIED_INPUTS


class RelativeAttention(T5Attention):
    """The attention that computes its stack's position bias: for packed rows that of a single row."""

    packed_rows: PackedRows | None = None
    """Of the last forward; backward runs the layer again under activation checkpointing."""

    def compute_bias(self, query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        if self.packed_rows is not None:
            query_length = key_length = self.packed_rows.rows.shape[1]
        bias: Tensor = super().compute_bias(query_length, key_length, *args, **kwargs)
        return bias


def relative_attention(stack: Any) -> RelativeAttention:
    """Return the attention of a stack that computes its position bias; a loaded checkpoint brings T5's own."""
    found: RelativeAttention = stack.block[0].layer[0].SelfAttention
    found.__class__ = RelativeAttention
    return found


class VisionT5(T5ForConditionalGeneration):
    """T5 with a frozen vision tower and a projector, or T5 alone, where both are None.

    With ``concat`` the visual tokens precede the text. T5's positions are relative, so the position bias among text
    tokens is unchanged; the visual tokens of a sample without an image are masked, and the model then equals T5. With
    ``gated`` the encoder reads the text alone and :class:`GatedFusion` adds the image to its states. Region tokens
    stand in the text in both cases.
    """

    config_class = VisionT5Config

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        return _TIED_INPUTS if has_own_head(self.config) else T5ForConditionalGeneration._tied_weights_keys

    def __init__(self, config: VisionT5Config) -> None:
        super().__init__(config)
        self.vision_tower: Any = None
        self.projector: Any = None
        if config.vision:
            self.vision_tower = tower = VisionTower(**config.vision)
            self.projector = VisualProjector(tower.width, config.d_model, tower.grid, config.projector)
        if config.fusion not in ("concat", "gated"):
            raise ValueError(f'fusion must be "concat" or "gated", not "{config.fusion}"')
        self.fusion = GatedFusion(config) if config.fusion == "gated" else None

    @property
    def is_packable(self) -> bool:
        """Whether :meth:`forward` can compute batches without padding."""
        return self.fusion is None and self.config._attn_implementation in (SDPA, PACKED)

    def packing(self, batch: Batch) -> Packing:
        """Return how :meth:`forward` computes a batch with labels without padding."""
        mask = batch["attention_mask"]
        if self.vision_tower is not None:
            visual = batch["pixel_mask"].unsqueeze(1).expand(-1, self.vision_tower.grid**2)
            mask = torch.cat([visual, mask], 1)
        counted = batch["labels"] != -100
        if not counted.any():  # attention needs a token
            counted[0, 0] = True
        decoder = {f"decoder_{name}": places for name, places in pack_rows(counted)._asdict().items()}
        return {**pack_rows(mask)._asdict(), **decoder, "labels": batch["labels"][counted]}

    def _init_weights(self, module: torch.nn.Module) -> None:
        # The tower and the projector initialize themselves; transformers' rule is for T5's own parts.
        if module.__class__.__module__.startswith("transformers.models.t5"):
            super()._init_weights(module)
        elif isinstance(module, GatedFusion):  # which a checkpoint may lack
            module.reset_parameters()

    def _initialize_weights(self, module: torch.nn.Module, is_custom_code: bool = False) -> None:
        # For foreign classes transformers treats a module without direct parameters as initialized.
        super()._initialize_weights(module)

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, pixel_mask: Tensor, regions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return text ``[B, S, d_model]`` with region tokens in place, and visual tokens ``[B, P, d_model]``."""
        visual, region_tokens = project_images(self, pixel_values, pixel_mask, regions)
        at_region = input_ids == self.config.region_token_id
        text = scatter_tokens(self.shared(input_ids), at_region, region_tokens)
        return text, visual.to(text.dtype)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        regions: Tensor | None = None,
        packed: PackedRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the states ``[B, L, d_model]`` that the decoder attends to, and their mask ``[B, L]``.

        L is P + S with ``concat`` and S with ``gated``. For the inputs see :meth:`TowerProcessor.encode`; by default
        all tokens of ``input_ids [B, S]`` are valid, and either all rows have an image or, without images, none. With
        ``packed`` the result is ``[1, N, d_model]`` and the mask of rows ``[B, 1, 1, L]``.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.vision_tower is None:
            check_text_only(pixel_values, regions)
            return self._states(self.shared(input_ids), attention_mask, packed)
        if pixel_values is None or pixel_mask is None:
            pixel_mask = input_ids.new_full(input_ids.shape[:1], int(pixel_values is not None))
        text, visual = self.embed(input_ids, pixel_values, pixel_mask, regions)
        if self.fusion is not None:
            states, _ = self._states(text, attention_mask, None)
            return self.fusion(states, attention_mask, visual, pixel_mask), attention_mask
        visual_mask = pixel_mask.to(attention_mask.dtype).unsqueeze(-1).expand(-1, visual.shape[1])
        mask = torch.cat([visual_mask, attention_mask], 1)
        return self._states(torch.cat([visual, text], 1), mask, packed)

    def _states(self, embeds: Tensor, mask: Tensor, packed: PackedRows | None) -> tuple[Tensor, Tensor]:
        relative_attention(self.encoder).packed_rows = packed
        if packed is None:
            return self.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, mask
        mask, rows = packed.valid[:, None, None], {"packed_rows": packed, "token_rows": packed.members}
        return self.encoder(inputs_embeds=packed.pack(embeds), attention_mask=mask, **rows).last_hidden_state, mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        regions: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        num_items_in_batch: Tensor | float | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Compute logits and, with labels, the loss. For the inputs see :meth:`encode`.

        Args:
            labels: ``[B, T]`` with -100 at padding
            encoder_outputs: result of the encoder, in generation; ``attention_mask`` is then that of :meth:`encode`
            num_items_in_batch: divisor of the summed loss; default the number of target tokens of this batch
            packing: the result of :meth:`packing` for this batch, to compute without padding; the logits are then those
                of the M target tokens, ``[1, M, vocabulary]``
        """
        relative_attention(self.decoder).packed_rows = None
        if packing is not None:
            assert input_ids is not None
            assert labels is not None
            images = pixel_values, pixel_mask, regions
            return self._forward_packed(input_ids, attention_mask, *images, labels, num_items_in_batch, packing)
        if encoder_outputs is None:
            assert input_ids is not None
            states, attention_mask = self.encode(input_ids, attention_mask, pixel_values, pixel_mask, regions)
            encoder_outputs = BaseModelOutput(last_hidden_state=states)
        if labels is not None:
            kwargs["decoder_input_ids"] = self._shift_right(labels)
            kwargs.setdefault("decoder_attention_mask", (labels != -100).long())
        output = super().forward(encoder_outputs=encoder_outputs, attention_mask=attention_mask, **kwargs)
        if labels is not None:
            output.loss = token_loss(output.logits, labels, num_items_in_batch)
        return output

    def _forward_packed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        pixel_mask: Tensor | None,
        regions: Tensor | None,
        labels: Tensor,
        num_items_in_batch: Tensor | float | None,
        packing: Packing,
    ) -> Seq2SeqLMOutput:
        self.set_attn_implementation(PACKED)
        for block in self.decoder.block:
            block.layer[1].EncDecAttention.reads_encoder = True
        encoder, decoder = packed_rows(packing), packed_rows(packing, "decoder_")
        states, mask = self.encode(input_ids, attention_mask, pixel_values, pixel_mask, regions, encoder)
        relative_attention(self.decoder).packed_rows = decoder
        output = super().forward(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_inputs_embeds=decoder.pack(self.shared(self._shift_right(labels))),
            decoder_attention_mask=decoder.causal_mask,
            use_cache=False,
            packed_rows=decoder,
            encoder_rows=encoder,
            token_rows=decoder.members,
            encoder_token_rows=encoder.members,
        )
        output.loss = token_loss(output.logits, packing["labels"].unsqueeze(0), num_items_in_batch)
        return output

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate token ids ``[B, T]``; ``kwargs`` are the images as in :meth:`encode` and generation settings."""
        states, mask = self.encode(input_ids, attention_mask, *(kwargs.pop(name, None) for name in IMAGE_INPUTS))
        encoder_outputs = BaseModelOutput(last_hidden_state=states)
        return super().generate(encoder_outputs=encoder_outputs, attention_mask=mask, **kwargs)


class T5Processor(TowerProcessor):
    """The processor of T5: prompts are the encoder's input, answers the decoder's, task markers are sentinels."""

    processor_type = "t5"

    @property
    def region_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(MARKERS[REGION]))

    def encode_text(self, prompts: Texts, has_image: Sequence[bool], answers: Texts | None, lengths: Lengths) -> Batch:
        """Encode prompts and answers; the model itself puts visual tokens before the text."""
        ids, mask = self._tokenize(prompts, lengths[0])
        batch = {"input_ids": ids, "attention_mask": mask}
        if answers is not None:
            rows = [self.with_end(found, lengths[1]) for found in self.answer_ids(answers)]
            target, valid = pad(rows, self.pad_token_id, left=False)
            batch["labels"] = target.masked_fill(valid == 0, -100)
        return batch

    def prompt_tokens(self, prompt: str) -> int:
        return len(self.tokenizer(self.without_specials(prompt))["input_ids"])  # with the end-of-sequence token

    def _tokenize(self, texts: Texts, max_length: int) -> tuple[Tensor, Tensor]:
        # The tokenizer does not truncate to a length that is no multiple of its padding, so padding is done here.
        found = self.tokenizer([self.without_specials(text) for text in texts], truncation=True, max_length=max_length)
        return pad(found["input_ids"], self.pad_token_id, left=False)

    def without_specials(self, text: str) -> str:
        """Break up special tokens in a user's text, and write the task markers as sentinels."""
        text = super().without_specials(text)
        for marker, sentinel in MARKERS.items():
            text = text.replace(marker, sentinel)
        return text

    def decode(self, token_ids: Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(token_ids, skip_special_tokens=False)
        written = {sentinel: f" {marker} " for marker, sentinel in MARKERS.items()}
        for token, text in {str(self.tokenizer.pad_token): " ", str(self.tokenizer.eos_token): " ", **written}.items():
            texts = [found.replace(token, text) for found in texts]
        return [one_line(text) for text in texts]


class T5Family(Family):
    """T5 and FLAN-T5."""

    name = "t5"
    description = "T5 and FLAN-T5"
    processor_class = T5Processor
    options = ("fusion", "vision", "vision_layer", "projector")
    saved_class = VisionT5

    def matches(self, config: Any) -> bool:
        return config.model_type in ("t5", VisionT5Config.model_type)

    def newly_initialized(self, options: LoadOptions) -> tuple[str, ...]:
        if options.vision is None:
            return ()
        return ("projector", "fusion") if options.fusion == "gated" else ("projector",)

    def describe(self, source: Source, options: LoadOptions, **changes: Any) -> VisionT5:
        settings = source.config.to_dict()
        settings |= {"vision": options.tower_settings(), "fusion": options.fusion, "projector": options.projector}
        for name in ("model_type", "architectures"):
            settings.pop(name, None)
        return VisionT5(VisionT5Config(**settings, **changes))

    def load(self, source: Source, options: LoadOptions) -> tuple[Any, Processor]:
        base = source.base
        tokenizer = source.load_tokenizer()
        region = tokenizer.convert_tokens_to_ids(MARKERS[REGION])
        if region is None or region == tokenizer.unk_token_id:
            raise UserError(f"{source.name}: the tokenizer has no {MARKERS[REGION]} for regions. Use a T5 tokenizer.")
        tower = options.load_tower()  # before the language model, so that a missing tower is reported at once
        model_class: Any = UntiedT5 if has_own_head(source.config) else T5ForConditionalGeneration
        language = model_class.from_pretrained(base, trust_remote_code=False, **options.from_pretrained)
        with torch.device("meta"):
            model = self.describe(source, options, region_token_id=region)
        for part, module in language.named_children():
            setattr(model, part, module)
        model.generation_config = language.generation_config
        model.vision_tower = tower
        complete_model(model, language, options.dtype, self.newly_initialized(options))
        processor = T5Processor(tokenizer, ImageTransform(**tower.preprocess) if tower else None)
        return model, processor


FAMILY = T5Family()
