"""A base of each family put together: a language model with a tower and a projector, and its processor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    T5ForConditionalGeneration,
)

from ..errors import UserError
from ..tasks.schema import REGION
from .causal import VisionCausalConfig, VisionCausalLM
from .clip_weights import open_clip_state, tower_of_clip
from .pictures import PictureTransform
from .processor import Processor
from .processor_causal import LLAVA_TEMPLATE, CausalProcessor
from .processor_image_text import ImageTextProcessor
from .processor_t5 import MARKERS, T5Processor
from .source import Source
from .t5 import OwnHeadT5, VisionT5, VisionT5Config, has_own_head
from .vision import VisionTower, tower_config


@dataclass(frozen=True)
class Options:
    """What of a base the user chooses.

    Args:
        fusion: of T5: ``concat`` or ``gated``
        tower, layer: ``model:tag`` of open_clip and the block taken of it, for a language model alone
        projector: kind of a fresh projector
        dtype: of all weights that are not quantised
        quantised: arguments of ``from_pretrained`` that quantise
        template: of a causal language model's conversation
    """

    fusion: str
    tower: str
    layer: int
    projector: str
    template: str | None
    dtype: torch.dtype = torch.float32
    quantised: dict[str, Any] = field(default_factory=dict)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``."""
        return {"dtype": self.dtype, "trust_remote_code": False, **self.quantised}


def load_own(source: Source, options: Options) -> tuple[Any, Processor]:
    """A model with tower and projector inside, as ``save_pretrained`` of ours wrote it."""
    kind: Any = VisionT5 if source.config.model_type == VisionT5Config.model_type else VisionCausalLM
    loading = {name: value for name, value in options.loading.items() if name != "trust_remote_code"}
    return kind.from_pretrained(source.base, **loading), Processor.from_pretrained(source.base)


def load_t5(source: Source, options: Options) -> tuple[VisionT5, Processor]:
    """A plain T5 checkpoint with a tower and a fresh projector."""
    tokenizer = AutoTokenizer.from_pretrained(source.base, trust_remote_code=False)
    kind: Any = OwnHeadT5 if has_own_head(source.config) else T5ForConditionalGeneration
    region = tokenizer.convert_tokens_to_ids(MARKERS[REGION])
    if region is None or region == tokenizer.unk_token_id:
        raise UserError(
            f"{source.name}: its tokenizer has no {MARKERS[REGION]}, which marks object regions. Use a T5 tokenizer."
        )
    tower = load_tower(options)  # first: if there is none, it is known before the language model is read
    language = kind.from_pretrained(source.base, **options.loading)
    with torch.device("meta"):
        model = VisionT5(t5_config(source.config, options, int(region)))
    for part, module in language.named_children():
        setattr(model, part, module)
    model.generation_config = language.generation_config
    model.vision_tower = tower
    _make_fresh(model, options.dtype, *fresh_parts(source.family, options))
    return _marked(model, language), T5Processor(tokenizer, PictureTransform(**tower.preprocess))


def load_causal(source: Source, options: Options) -> tuple[VisionCausalLM, Processor]:
    """A causal language model with a tower and a fresh projector."""
    tokenizer = AutoTokenizer.from_pretrained(source.base, trust_remote_code=False)
    tower = load_tower(options)
    language = AutoModelForCausalLM.from_pretrained(source.base, **options.loading)
    processor = CausalProcessor(tokenizer, PictureTransform(**tower.preprocess), tower.grid**2, options.template)
    with torch.device("meta"):
        model = VisionCausalLM(
            VisionCausalConfig(source.config, vision_of(options), options.projector, **processor.slots)
        )
    model.language_model, model.vision_tower = language, tower
    model.generation_config = _generation(language, processor)
    _make_fresh(model, options.dtype, *fresh_parts(source.family, options))
    return _marked(model, language), processor


def load_llava(source: Source, options: Options) -> tuple[VisionCausalLM, Processor]:
    """A checkpoint of LLaVA-1.5 in the layout of llava-hf: language model, CLIP tower and projector are all its own."""
    tokenizer = AutoTokenizer.from_pretrained(source.base, trust_remote_code=False)
    whole = LlavaForConditionalGeneration.from_pretrained(source.base, **options.loading)
    vision = llava_vision(source.config)
    tower = VisionTower(**vision)
    tower.trunk.load_state_dict(open_clip_state(_whole_state(whole.model.vision_tower)))
    template = options.template or LLAVA_TEMPLATE  # its chat template is for messages in parts, and says the same
    processor = CausalProcessor(tokenizer, PictureTransform(**tower.preprocess), tower.grid**2, template)
    with torch.device("meta"):
        model = VisionCausalLM(VisionCausalConfig(source.config.text_config, vision, "mlp2x_gelu", **processor.slots))
    language: Any = model.language_model
    setattr(language, language.base_model_prefix, whole.model.language_model)
    language.set_output_embeddings(whole.lm_head)
    model.vision_tower = tower.to(options.dtype)
    model.generation_config = _generation(whole, processor)
    _make_fresh(model, options.dtype, "projector")
    theirs, projector = whole.model.multi_modal_projector, model.projector
    projector.layers = nn.Sequential(theirs.linear_1, nn.GELU(), theirs.linear_2)
    # A region starts as the mean of the patches under its box, which the language model knows how to read.
    nn.init.zeros_(projector.box_embedding.weight)
    nn.init.zeros_(projector.box_embedding.bias)
    model.fresh_parts = ()
    return _marked(model, whole), processor


def load_image_text(source: Source, options: Options) -> tuple[Any, Processor]:
    """Any other image-text-to-text model of transformers, as it is."""
    processor = ImageTextProcessor(AutoProcessor.from_pretrained(source.base, trust_remote_code=False))
    model = AutoModelForImageTextToText.from_pretrained(source.base, **options.loading)
    model.generation_config = _generation(model, processor)
    return model, processor


LOADERS = {
    "own": load_own,
    "t5": load_t5,
    "causal": load_causal,
    "llava": load_llava,
    "image_text": load_image_text,
}


def empty_model(source: Source, options: Options) -> Any:
    """The model of the source on the meta device: its shapes without its weights, in no time, whatever its size."""
    config, family = source.config, source.family
    with torch.device("meta"):
        if family == "image_text":
            return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        if family == "t5":
            model: Any = VisionT5(t5_config(config, options, VisionT5Config().region_token_id))
        elif family == "causal":
            model = VisionCausalLM(VisionCausalConfig(config, vision_of(options), options.projector))
        elif family == "llava":
            model = VisionCausalLM(VisionCausalConfig(config.text_config, llava_vision(config)))
        else:
            model = (VisionT5 if config.is_encoder_decoder else VisionCausalLM)(config)
    model.fresh_parts = fresh_parts(family, options)
    return model


def fresh_parts(family: str, options: Options) -> tuple[str, ...]:
    """The parts of which no checkpoint of such a base has weights."""
    if family == "t5" and options.fusion == "gated":
        return "projector", "fusion"
    return ("projector",) if family in ("t5", "causal") else ()


def t5_config(config: Any, options: Options, region_token_id: int) -> VisionT5Config:
    """T5's own configuration with a tower beside it."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    ours = {"vision": vision_of(options), "fusion": options.fusion, "projector": options.projector}
    return VisionT5Config(**settings, **ours, region_token_id=region_token_id)


def vision_of(options: Options) -> dict[str, Any]:
    """Arguments of :class:`VisionTower` that make the tower again without its weights, and without the hub."""
    name, _ = split_tower(options.tower)
    return {"model": tower_config(name) if ":" in name else name, "layer": options.layer}


def llava_vision(config: Any) -> dict[str, Any]:
    """The same of the CLIP tower inside a LLaVA."""
    return {"model": tower_of_clip(config.vision_config), "layer": config.vision_feature_layer}


def load_tower(options: Options) -> VisionTower:
    """The tower of ``options`` with its weights; without a tag they are random."""
    name, tag = split_tower(options.tower)
    return VisionTower(name, pretrained=tag, layer=options.layer).to(options.dtype)


def split_tower(text: str) -> tuple[str, str | None]:
    """open_clip's model and pretrained tag of ``model:tag``; ``hf-hub:...`` and ``local-dir:...`` are models."""
    if text.startswith(("hf-hub:", "local-dir:")):
        return text, None
    name, _, tag = text.partition(":")
    return name, tag or None


def _make_fresh(model: Any, dtype: torch.dtype, *parts: str) -> None:
    """Initial weights for parts that are on the meta device and in no checkpoint.

    They depend on torch's seed alone, not on what was drawn since: loading draws other numbers under ZeRO-3.
    """
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed())
        for part in parts:
            modules = list(getattr(model, part).to_empty(device="cpu").modules())
            for module in modules:
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            for module in modules:  # afterwards: T5's own rule is that of a layer for all its linear parts
                model._init_weights(module)
            getattr(model, part).to(dtype)
    model.fresh_parts = parts


def _whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights on the CPU, gathered where ZeRO-3 has partitioned them."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        return module.state_dict()
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}


def _generation(model: Any, processor: Processor) -> GenerationConfig:
    """Greedy decoding until one of the model's own ends or the tokenizer's, which stands behind every answer."""
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), processor.tokenizer.eos_token_id]
    return GenerationConfig(
        eos_token_id=list(dict.fromkeys(end for end in ends if end is not None)),
        pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=False,
    )


def _marked(model: Any, language: Any) -> Any:
    """``model`` with what transformers notes on a quantised model: PEFT looks for it there."""
    for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(language, name):
            setattr(model, name, getattr(language, name))
    return model
