"""From the CLIP vision tower of transformers, as it stands inside LLaVA, to open_clip's vision transformer."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPVisionConfig

from ..errors import UserError

ACTIVATIONS = {"quick_gelu": True, "gelu": False}
"""Activations of transformers that open_clip has too, and whether each is QuickGELU."""

_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
}
_BLOCK_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_ATTENTION = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


def tower_of_clip(config: CLIPVisionConfig, projection: bool = False) -> dict[str, Any]:
    """The mapping form of :class:`lvlm_clorae.models.vision.VisionTower` for a CLIP tower of transformers.

    Args:
        config: of ``CLIPVisionModel``; inside a LLaVA its ``vision_config``
        projection: whether the checkpoint has a ``visual_projection``, which LLaVA's has not

    Raises:
        UserError: an activation that open_clip has not, or pictures without three channels.
    """
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f'The CLIP vision tower has the activation "{config.hidden_act}": its weights cannot be used here, since '
            f"open_clip has only {' and '.join(ACTIVATIONS)}."
        )
    if config.num_channels != 3:
        raise UserError(f"The CLIP vision tower takes {config.num_channels} channels; pictures here have 3.")
    width, hidden = config.hidden_size, config.intermediate_size
    ratio = hidden / width
    tower = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "width": width,
        "layers": config.num_hidden_layers,
        "head_width": width // config.num_attention_heads,
        # open_clip rounds width * ratio down, which a quotient that was rounded itself can bring one too low
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "quick_gelu": ACTIVATIONS[config.hidden_act],
    }
    if config.layer_norm_eps != 1e-5:  # open_clip's own
        tower["norm_kwargs"] = {"eps": config.layer_norm_eps}
    if projection:
        tower["embed_dim"] = config.projection_dim
    return tower


def open_clip_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a ``CLIPVisionModel`` under the names of open_clip's ``VisionTransformer``, to be loaded strictly.

    Where the checkpoint has no ``visual_projection``, ``proj`` is the identity: what open_clip then pools is the
    ``pooler_output`` of transformers. The patch tokens do not depend on it.

    Args:
        state: with or without the prefix ``vision_model.``, which older releases of transformers write

    Raises:
        UserError: a weight that CLIP's tower has not, or one of query, key and value that is missing.
    """
    found: dict[str, torch.Tensor] = {}
    joined: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        name = key.removeprefix("vision_model.")
        if attention := _ATTENTION.fullmatch(name):
            layer, which, kind = attention.groups()
            joined[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"][which] = tensor
        elif name == "visual_projection.weight":
            found["proj"] = tensor.T.contiguous()
        elif name != "embeddings.position_ids":  # no weight, but older checkpoints hold it
            found[_renamed(name)] = tensor
    for name, parts in joined.items():
        if missing := sorted(set("qkv") - set(parts)):
            raise UserError(f"The checkpoint of the CLIP vision tower lacks the {missing[0]} of {name}.")
        found[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    if "proj" not in found and "class_embedding" in found:
        found["proj"] = torch.eye(len(found["class_embedding"])).to(found["class_embedding"])
    return found


def _renamed(name: str) -> str:
    prefix, rest, names = "", name, _NAMES
    if inside := _LAYER.fullmatch(name):
        prefix, rest, names = f"transformer.resblocks.{inside[1]}.", inside[2], _BLOCK_NAMES
    for theirs, ours in names.items():
        if rest == theirs or rest in (f"{theirs}.weight", f"{theirs}.bias"):
            return prefix + ours + rest.removeprefix(theirs)
    raise UserError(f"The checkpoint's vision tower has a weight {name}: it is none of CLIP.")
