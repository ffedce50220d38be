"""The family of causal language models, with projected patches at LLaVA's ``<image>`` placeholders."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ...errors import UserError
from ...losses.token_loss import token_loss
from ...tasks.schema import NONE, REGION
from ..decoding import decode
from ..packing import Packing, common_prefix, is_packable, pack_causal, packed_inputs
from ..processor import (
    PADDING_MULTIPLE,
    Batch,
    ImageTransform,
    Lengths,
    Processor,
    Texts,
    TowerProcessor,
    pad,
    with_end_token,
)
from ..projector import IMAGE_INPUTS, VisualProjector, check_text_only, project_images, scatter_tokens
from ..vision import VisionTower
from . import Family, LoadOptions, Source, complete_model, greedy_generation

IMAGE = "<image>"
NO_PLACEHOLDERS = -1, -2
MIN_PREFIX = 16
"""Generation computes a shorter common beginning of prompts with the rest: it costs a further forward."""
LLAVA_TEMPLATE = "USER: {image}{prompt} ASSISTANT: {answer}"


class VisionCausalConfig(PretrainedConfig):
    """Configuration of a language model, plus the arguments of :class:`VisionTower`, None for text only, and projector.

    ``image_token_id`` stands once for every visual token of an image and ``region_token_id`` for an object region.
    Neither needs a row of the embedding table.
    """

    model_type = "vision_causal_lm"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers reads it from the class

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision: dict[str, Any] | None = None,
        projector: str = "mlp2x_gelu",
        image_token_id: int = NO_PLACEHOLDERS[0],
        region_token_id: int = NO_PLACEHOLDERS[1],
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.vision, self.projector = vision, projector
        self.image_token_id, self.region_token_id = image_token_id, region_token_id
        super().__init__(**kwargs)


AutoConfig.register(VisionCausalConfig.model_type, VisionCausalConfig)


class VisionCausalLM(PreTrainedModel, GenerationMixin):
    """Any causal language model of transformers with a frozen vision tower and a projector.

    A row without an image has no ``<image>`` tokens, and the model then equals its language model. In a
    text-only model tower and projector are None.
    """

    config_class = VisionCausalConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config: VisionCausalConfig) -> None:
        super().__init__(config)
        # The class itself, since from_config would partition modules on the meta device under ZeRO-3.
        self.language_model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)](config.text_config)
        self.vision_tower: Any = None
        self.projector: Any = None
        if config.vision:
            self.vision_tower = tower = VisionTower(**config.vision)
            width = self.language_model.get_input_embeddings().embedding_dim
            self.projector = VisualProjector(tower.width, width, tower.grid, config.projector)
        self._takes = set(inspect.signature(self.language_model.forward).parameters)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: all parts initialize themselves."""

    @property
    def is_packable(self) -> bool:
        """Whether :meth:`forward` can compute batches without padding, and :meth:`decode` generate."""
        return is_packable(self.language_model)

    def packing(self, batch: Batch) -> Packing:
        """Return how :meth:`forward` computes a batch with labels without padding."""
        return pack_causal(batch, (self.config.image_token_id, self.config.region_token_id))

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, pixel_mask: Tensor | None, regions: Tensor | None
    ) -> Tensor:
        """Embed text and images to the language model's input ``[B, S, d]``; for the arguments see :meth:`forward`."""
        if self.vision_tower is None:
            check_text_only(pixel_values, regions)
            return self.get_input_embeddings()(input_ids)
        at_image = input_ids == self.config.image_token_id
        if pixel_mask is None:
            pixel_mask = at_image.any(1).long()
        visual, region_tokens = project_images(self, pixel_values, pixel_mask, regions)
        at_region = input_ids == self.config.region_token_id
        text = self.get_input_embeddings()(input_ids.masked_fill(at_image | at_region, 0))
        return scatter_tokens(scatter_tokens(text, at_image, visual), at_region, region_tokens)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        regions: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits of all tokens; with labels the loss, and the logits ``[B, T, vocabulary]`` that predict them.

        Args:
            input_ids: ``[B, S]``; for this and the image inputs see :meth:`TowerProcessor.encode`. By default all
                tokens are valid, and the rows with image tokens have an image.
            labels: ``[B, T]``, T <= S, of the last T tokens, -100 at tokens without a loss
            num_items_in_batch: divisor of the summed loss; default the number of target tokens of this batch
            packing: the result of :meth:`packing` for this batch, to compute without padding; the logits are then those
                of the M target tokens, ``[1, M, vocabulary]``
        """
        if packing is not None:
            embeds = self.embed(input_ids, pixel_values, pixel_mask, regions)
            output = self.language_model(**packed_inputs(self.language_model, embeds, packing), use_cache=False)
            output.loss = token_loss(output.logits, packing["labels"].unsqueeze(0), num_items_in_batch)
            return output
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if "position_ids" in self._takes:  # left padding must not count
            kwargs.setdefault("position_ids", (attention_mask.cumsum(-1) - 1).clamp(min=0))
        # The vocabulary is wide and prompts are long: only the logits that predict a label are computed.
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
    def decode(self, batch: Batch, max_new_tokens: int, **how: Any) -> Tensor:
        """Return the new tokens of a batch of prompts; for ``how`` see :func:`decode`. Needs :attr:`is_packable`."""
        inputs = dict(batch)
        self.language_model.generation_config = self.generation_config
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        embeds = self.embed(ids, *(inputs.pop(name, None) for name in IMAGE_INPUTS))
        return decode(self.language_model, embeds, mask, max_new_tokens, **how)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate new token ids ``[B, T]`` by the language model's own ``generate`` with its KV cache.

        Rows are padded on the left; ``kwargs`` are the images as in :meth:`forward` and generation settings.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.language_model.generation_config = self.generation_config
        embeds = self.embed(input_ids, *(kwargs.pop(name, None) for name in IMAGE_INPUTS))
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


class CausalProcessor(TowerProcessor):
    """The processor of causal language models: LLaVA's placeholders, template and label mask.

    Prompts are padded on the left and answers on the right, so that all answers start in one column. A training row is
    the row that generation starts from plus the tokens of the answer, which alone are labels.

    An image has ``visual_tokens`` placeholders ``<image>``; a text-only base has no placeholders. The ``template`` is a
    conversation with ``{image}``, which gets its own line, ``{prompt}`` and, last, ``{answer}``. An image without a
    prompt gets LLaVA's ``plain`` conversation, the image and then the answer.
    """

    processor_type = "causal"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: ImageTransform | None,
        visual_tokens: int = 0,
        template: str | None = None,
    ) -> None:
        # Their ids may lie beyond the embedding table, since the model replaces their embeddings.
        vocabulary, names = tokenizer.get_vocab(), [IMAGE, REGION] if image_transform else []
        new = [AddedToken(name, special=True, normalized=False) for name in names if name not in vocabulary]
        tokenizer.add_tokens(new, special_tokens=True)
        super().__init__(with_end_token(tokenizer), image_transform)
        ids: Any = tokenizer.convert_tokens_to_ids(names) or NO_PLACEHOLDERS
        self.image_token_id, self.region_token_id = ids
        self.visual_tokens = visual_tokens
        self.template = checked_template(template or default_template(tokenizer))
        before = self.template.partition("{answer}")[0]
        # The space before an answer is part of its first token.
        self._before = before.rstrip(" ")
        self._space = before[len(self._before) :]
        self._bos = not (tokenizer.bos_token and self._before.startswith(tokenizer.bos_token))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "visual_tokens": self.visual_tokens, "template": self.template}

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """The placeholders' ids under their names in the model's configuration."""
        return {"image_token_id": self.image_token_id, "region_token_id": self.region_token_id}

    def encode_text(self, prompts: Texts, has_image: Sequence[bool], answers: Texts | None, lengths: Lengths) -> Batch:
        """Encode prompts and answers; ``labels [B, T]`` belong to the last T columns of ``input_ids [B, S]``."""
        heads = [self._head(prompt, shown, lengths[0]) for prompt, shown in zip(prompts, has_image, strict=True)]
        ids, mask = pad([self._head_ids(head) for head in heads], self.pad_token_id, left=True)
        if answers is None:
            return {"input_ids": ids, "attention_mask": mask}
        found = [self._answer_ids(head, answer) for head, answer in zip(heads, answers, strict=True)]
        rows = [self.with_end(row, lengths[1]) for row in found]
        answer_ids, answer_mask = pad(rows, self.pad_token_id, left=False)
        return {
            "input_ids": torch.cat([ids, answer_ids], 1),
            "attention_mask": torch.cat([mask, answer_mask], 1),
            "labels": answer_ids.masked_fill(answer_mask == 0, -100),
        }

    def shared_prefix(self, batch: Batch) -> int:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        found = common_prefix(ids, mask, int(mask.sum(1).min()) - 1, tuple(self.placeholder_ids.values()))
        return found if found >= MIN_PREFIX else 0

    def answer_ids(self, answers: Texts) -> list[list[int]]:
        head = self._head(NONE, False, PADDING_MULTIPLE)  # any prompt, since answers follow the template's own text
        return [self._answer_ids(head, answer) for answer in answers]

    def _head(self, prompt: str, has_image: bool, max_length: int) -> str:
        """Return the conversation up to the answer."""
        if has_image and not prompt:
            return IMAGE if self._bos else f"{self.tokenizer.bos_token}{IMAGE}"
        prompt = self.truncate(self.without_specials(prompt), max_length)
        return self._before.replace("{image}", f"{IMAGE}\n" if has_image else "").replace("{prompt}", prompt)

    def _head_ids(self, head: str) -> list[int]:
        found: list[int] = self.tokenizer(head, add_special_tokens=self._bos)["input_ids"]
        if found and found[-1] == self.eos_token_id and not head.endswith(str(self.tokenizer.eos_token)):
            found = found[:-1]  # some tokenizers append it to every text
        return [token for token in found for _ in range(self.visual_tokens if token == self.image_token_id else 1)]

    def _answer_ids(self, head: str, answer: str) -> list[int]:
        """Tokenize the answer in the context of the conversation."""
        answer = self._space + self.without_specials(answer)
        whole = self.tokenizer(head + answer, add_special_tokens=False, return_offsets_mapping=True)
        spans = whole["offset_mapping"]
        found = [token for token, (start, _) in zip(whole["input_ids"], spans, strict=True) if start >= len(head)]
        # A token may span the border; the answer's part of it would be lost.
        if any(start < len(head) < end for start, end in spans):
            found = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [token for token in found if token != self.eos_token_id]


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template for one user turn, or LLaVA-1.5's template where there is none."""
    if not tokenizer.chat_template:
        return LLAVA_TEMPLATE
    turn = [{"role": "user", "content": "{image}{prompt}"}]
    try:
        before = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a jinja template may raise anything
        raise UserError(f"The tokenizer's chat template cannot be rendered ({error}). Set a prompt template.") from None
    return checked_template(before + "{answer}")


def checked_template(template: str) -> str:
    """Return ``template``. Raises UserError unless each field occurs once and the answer last."""
    for name in ("{image}", "{prompt}", "{answer}"):
        if template.count(name) != 1:
            raise UserError(f'Prompt template "{template}" has {name} {template.count(name)} times. Write it once.')
    if template.index("{answer}") < max(template.index("{image}"), template.index("{prompt}")):
        raise UserError(f'The prompt template "{template}" must have {{answer}} last. Move it to the end.')
    return template


class CausalFamily(Family):
    """Causal language models of transformers."""

    name = "causal"
    description = "causal language models of transformers"
    processor_class = CausalProcessor
    options = ("vision", "vision_layer", "projector", "template")
    saved_class = VisionCausalLM

    def matches(self, config: Any) -> bool:
        if self.is_saved(config):
            return True
        # transformers also has a causal form of BERT: the checkpoint's own architecture decides.
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        return architecture is not None and architecture in (config.architectures or [architecture])

    def newly_initialized(self, options: LoadOptions) -> tuple[str, ...]:
        return ("projector",) if options.vision else ()

    def describe(self, source: Source, options: LoadOptions, **placeholder_ids: Any) -> VisionCausalLM:
        vision = options.tower_settings()
        return VisionCausalLM(VisionCausalConfig(source.config, vision, options.projector, **placeholder_ids))

    def load(self, source: Source, options: LoadOptions) -> tuple[Any, Processor]:
        base = source.base
        tokenizer = source.load_tokenizer()
        tower = options.load_tower()
        language = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **options.from_pretrained)
        transform, tokens = (ImageTransform(**tower.preprocess), tower.grid**2) if tower else (None, 0)
        processor = CausalProcessor(tokenizer, transform, tokens, options.template)
        with torch.device("meta"):
            model: Any = self.describe(source, options, **processor.placeholder_ids)
        model.language_model, model.vision_tower = language, tower
        model.generation_config = greedy_generation(language, processor)
        complete_model(model, language, options.dtype, self.newly_initialized(options))
        return model, processor


FAMILY = CausalFamily()
