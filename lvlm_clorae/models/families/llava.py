"""The family of LLaVA-1.5 in the layout of llava-hf; its CLIP tower is converted to open_clip's."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

from ...errors import UserError
from ..processor import ImageTransform
from ..vision import VisionTower
from . import Family, LoadOptions, Source, complete_model, greedy_generation
from .causal import LLAVA_TEMPLATE, CausalProcessor, VisionCausalConfig, VisionCausalLM

ACTIVATIONS = {"quick_gelu": True, "gelu": False}
"""Activations of transformers that open_clip supports too -> whether it is QuickGELU."""

_NAMES = {
    r"embeddings\.class_embedding": "class_embedding",
    r"embeddings\.patch_embedding(\.weight)": r"conv1\1",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"pre_layrnorm(\.\w+)": r"ln_pre\1",
    r"post_layernorm(\.\w+)": r"ln_post\1",
    r"encoder\.layers(\.\d+\.)layer_norm([12]\.\w+)": r"transformer.resblocks\1ln_\2",
    r"encoder\.layers(\.\d+\.)mlp\.fc1(\.\w+)": r"transformer.resblocks\1mlp.c_fc\2",
    r"encoder\.layers(\.\d+\.)mlp\.fc2(\.\w+)": r"transformer.resblocks\1mlp.c_proj\2",
    r"encoder\.layers(\.\d+\.)self_attn(\.out_proj\.\w+)": r"transformer.resblocks\1attn\2",
}
_ATTENTION = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


def tower_of_clip(config: CLIPVisionConfig) -> dict[str, Any]:
    """Convert the configuration of transformers' ``CLIPVisionModel`` to a mapping for :class:`VisionTower`."""
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f'The CLIP vision tower has the activation "{config.hidden_act}", which open_clip does not support. '
            f"Use a checkpoint with {' or '.join(ACTIVATIONS)}."
        )
    if config.num_channels != 3:
        raise UserError(f"The CLIP vision tower takes {config.num_channels} channels. Use a checkpoint for 3 channels.")
    width, hidden = config.hidden_size, config.intermediate_size
    ratio = hidden / width
    tower = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "width": width,
        "layers": config.num_hidden_layers,
        "head_width": width // config.num_attention_heads,
        # open_clip rounds width * ratio down, and a quotient that was itself rounded down gives one too few
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "quick_gelu": ACTIVATIONS[config.hidden_act],
    }
    if config.layer_norm_eps != 1e-5:  # open_clip's default
        tower["norm_kwargs"] = {"eps": config.layer_norm_eps}
    return tower


def open_clip_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the state of a ``CLIPVisionModel`` to that of open_clip's ``VisionTransformer``, for a strict load.

    The projection ``proj``, which LLaVA's checkpoints lack, becomes an identity matrix, so that the pooled output
    equals the ``pooler_output`` of transformers. Older releases of transformers write the prefix ``vision_model.``.
    """
    found: dict[str, torch.Tensor] = {}
    joined: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        name = key.removeprefix("vision_model.")
        if attention := _ATTENTION.fullmatch(name):
            layer, which, parameter = attention.groups()
            joined[f"transformer.resblocks.{layer}.attn.in_proj_{parameter}"][which] = tensor
        elif name != "embeddings.position_ids":  # a constant that older checkpoints contain
            found[_renamed(name)] = tensor
    for name, parts in joined.items():
        if missing := sorted(set("qkv") - set(parts)):
            raise UserError(f"The CLIP vision tower has no {missing[0]} for {name}. Download the checkpoint again.")
        found[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    if "class_embedding" in found:
        found["proj"] = torch.eye(len(found["class_embedding"])).to(found["class_embedding"])
    return found


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES.items():
        if found := re.fullmatch(theirs, name):
            return found.expand(ours)
    raise UserError(f"The vision tower has an unknown weight {name}. Use a checkpoint with a CLIP tower.")


class LlavaFamily(Family):
    """LLaVA-1.5: the patches of one layer of a CLIP tower through an MLP of two layers, all from the checkpoint."""

    name = "llava"
    description = "LLaVA-1.5"
    processor_class = CausalProcessor
    options = ("template",)

    def matches(self, config: Any) -> bool:
        return bool(
            config.model_type == "llava"
            and config.vision_config.model_type == "clip_vision_model"
            and isinstance(config.vision_feature_layer, int)
            and config.vision_feature_select_strategy == "default"
            and config.projector_hidden_act == "gelu"
            and config.multimodal_projector_bias
        )

    def describe(self, source: Source, options: LoadOptions, **placeholder_ids: Any) -> VisionCausalLM:
        config, vision = source.config.text_config, _tower_settings(source.config)
        return VisionCausalLM(VisionCausalConfig(config, vision, **placeholder_ids))

    def load(self, source: Source, options: LoadOptions) -> tuple[VisionCausalLM, CausalProcessor]:
        tokenizer = source.load_tokenizer()
        whole = LlavaForConditionalGeneration.from_pretrained(
            source.base, trust_remote_code=False, **options.from_pretrained
        )
        tower = VisionTower(**_tower_settings(source.config))
        tower.trunk.load_state_dict(open_clip_state(_gathered_state(whole.model.vision_tower)))
        # The published chat template takes messages in parts; LLAVA_TEMPLATE writes the same conversation.
        template = options.template or LLAVA_TEMPLATE
        processor = CausalProcessor(tokenizer, ImageTransform(**tower.preprocess), tower.grid**2, template)
        with torch.device("meta"):
            model = self.describe(source, options, **processor.placeholder_ids)
        language: Any = model.language_model
        setattr(language, language.base_model_prefix, whole.model.language_model)
        language.set_output_embeddings(whole.lm_head)
        model.vision_tower = tower.to(options.dtype)
        model.generation_config = greedy_generation(whole, processor)
        complete_model(model, whole, options.dtype, ("projector",))
        theirs, projector = whole.model.multi_modal_projector, model.projector
        projector.layers = nn.Sequential(theirs.linear_1, nn.GELU(), theirs.linear_2)
        # A region starts as the mean of the patches under its box, which the language model can already read.
        nn.init.zeros_(projector.box_embedding.weight)
        nn.init.zeros_(projector.box_embedding.bias)
        return model, processor


def _tower_settings(config: Any) -> dict[str, Any]:
    """Return arguments of :class:`VisionTower` for the CLIP tower of a LLaVA."""
    return {"model": tower_of_clip(config.vision_config), "layer": config.vision_feature_layer}


def _gathered_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights on the CPU, gathered where ZeRO-3 has partitioned them."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        return module.state_dict()
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}


FAMILY = LlavaFamily()
