"""Vision towers in directories: of timm (``config.json`` names an ``architecture``) and DINOv2 of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, Dinov2Model, Dinov2WithRegistersModel, PreTrainedModel

from ..errors import UserError, first_line
from ..files import parse_json

TRANSFORMERS: dict[str, Any] = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
"""Model type of transformers -> class. Its tokens end with the patches, and it takes images of any size."""
WEIGHTS = "model.safetensors"


def read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the architecture as a mapping for ``VisionTower``, and ``mean``, ``std`` and ``interpolation``.

    Raises UserError unless it is a directory of timm's hub format or of a DINOv2 of transformers.
    """
    content = _read(directory / "config.json")
    if "architecture" in content:
        settings = content.get("pretrained_cfg", {})
        size = settings.get("input_size", (3, 224, 224))[-1]
        tower = {"timm_model_name": content["architecture"], "timm_pool": "", "timm_proj": "none"}
        return {**tower, "image_size": size}, settings
    if content.get("model_type") not in TRANSFORMERS:
        raise UserError(
            f"{directory}: not a vision tower of timm or a model of type {' or '.join(TRANSFORMERS)}. Give one of "
            "these, or a directory written by open_clip."
        )
    settings = _read(directory / "preprocessor_config.json", optional=True)
    size = settings.get("crop_size", settings.get("size", content.get("image_size", 224)))
    size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    known = {"mean": settings.get("image_mean"), "std": settings.get("image_std")}
    return {"transformers": content, "image_size": size}, known


def build(config: dict[str, Any]) -> PreTrainedModel:
    """Build a tower of transformers with random weights."""
    # The class itself, since from_config would partition modules on the meta device under ZeRO-3.
    found: PreTrainedModel = TRANSFORMERS[config["model_type"]](AutoConfig.for_model(**config))
    return found


def load_transformers(trunk: PreTrainedModel, directory: Path) -> Any:
    """Load a tower of the class of ``trunk``, by transformers, since names of weights differ between its releases."""
    how = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        found, info = type(trunk).from_pretrained(directory, **how)
    except Exception as error:  # of safetensors, or of transformers for weights that do not fit
        raise UserError(f"{directory}: the vision tower cannot be loaded: {first_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{directory}: the vision tower lacks {len(missing)} weights ({missing[0]}). Copy it again.")
    return found


def timm_state(directory: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a timm directory without the classifier, named as in open_clip's ``TimmModel``."""
    head = _read(directory / "config.json").get("pretrained_cfg", {}).get("classifier") or "head"
    try:
        state = load_file(directory / WEIGHTS)
    except Exception as error:  # of safetensors for an invalid file
        raise UserError(
            f"{directory / WEIGHTS} cannot be read: {first_line(error)} Give a directory written by timm."
        ) from None
    return {f"trunk.{name}": tensor for name, tensor in state.items() if not name.startswith(f"{head}.")}


def _read(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Give a tower of timm or transformers.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object. Copy it again.")
    return found
