"""The frozen vision tower: vision transformers, ResNets and towers from timm by open_clip, and transformers' DINOv2."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import load_state_dict
from open_clip.model import ModifiedResNet, VisionTransformer, _build_vision_tower, resize_pos_embed
from open_clip.pretrained import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, download_pretrained, download_pretrained_from_hf
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError, first_line, nearest
from ..files import parse_json
from .tower_directory import build, load_transformers, read_directory, timm_state

REPOSITORIES = ("hf-hub:", "local-dir:")
"""Prefixes of a model name whose ``open_clip_config.json`` is stored with its weights."""
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


class VisionTower(nn.Module):
    """Patch tokens (for a CNN: cells of the feature map) of one layer, always in eval mode and without gradients.

    All buffers are part of the state: ``from_pretrained`` builds on the meta device and leaves a buffer that is not in
    the checkpoint (EVA's rotary table, Swin's position index) uninitialized.

    Args:
        model: a name in ``open_clip.list_models()``; ``hf-hub:OWNER/NAME`` or ``local-dir:PATH``, with their own
            weights; a directory (:mod:`~lvlm_clorae.models.tower_directory`); or a mapping of
            ``open_clip.CLIPVisionCfg`` fields, as returned by :func:`tower_config`
        pretrained: a tag of open_clip or a weight file with keys ``visual.*`` (PyTorch or safetensors); None leaves
            the weights to a checkpoint. Weight files are never unpickled, and not read on the meta device.
        layer: index among the blocks of a transformer (LLaVA uses -2) or the stages of a CNN

    Attributes:
        width, grid, image_size: features per token, tokens along a side, pixels along a side
        preprocess: arguments of ``ImageTransform`` by the pretrained tag, the repository or the model's first tag
    """

    def __init__(self, model: str | dict[str, Any], pretrained: str | None = None, layer: int = -2) -> None:
        super().__init__()
        name = model if isinstance(model, str) else "The configured tower"
        config, settings = _description(model, pretrained)
        weights = None if torch.get_default_device().type == "meta" else _weight_file(name, pretrained)
        self.image_size = _square(config.get("image_size", 224), name)
        self.trunk: Any = _build({**config, "image_size": self.image_size}, name)
        self.eval()
        if weights is not None and isinstance(self.trunk, PreTrainedModel):
            self.trunk = load_transformers(self.trunk, Path(weights))
        elif weights is not None:
            _load(self.trunk, weights, name)
        for module in self.trunk.modules():
            module._non_persistent_buffers_set.clear()
        maps = _maps(self.trunk, self.image_size, name)
        if not -len(maps) <= layer < len(maps):
            raise UserError(
                f"{name} has no layer {layer}. Choose 0 to {len(maps) - 1}, or -1 to -{len(maps)} from the end."
            )
        self.layer = layer % len(maps)
        self.width, self.grid, columns = maps[self.layer]
        if self.grid != columns:
            raise UserError(f"Layer {layer} of {name} has {self.grid} x {columns} maps. Use a tower with square maps.")
        self.preprocess: dict[str, Any] = {
            "image_size": self.image_size,
            "mean": tuple(settings.get("mean") or open_clip.OPENAI_DATASET_MEAN),
            "std": tuple(settings.get("std") or open_clip.OPENAI_DATASET_STD),
            "interpolation": "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic",
        }

    def train(self, mode: bool = True) -> VisionTower:
        """Stay in eval mode without gradients, also after ``from_pretrained``, which creates new parameters."""
        self.requires_grad_(False)
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode ``pixel_values [B, 3, H, W]`` to tokens ``[B, grid * grid, width]``, row by row, no class token."""
        if isinstance(self.trunk, PreTrainedModel):
            states = self.trunk(pixel_values, output_hidden_states=True).hidden_states
            return states[self.layer + 1][:, -(self.grid**2) :]
        transformer = isinstance(self.trunk, VisionTransformer)
        found = self.trunk.forward_intermediates(
            pixel_values,
            indices=[self.layer],
            # open_clip's ResNet inverts this flag: with stop_early it runs to its end.
            stop_early=not isinstance(self.trunk, ModifiedResNet),
            intermediates_only=True,
            output_fmt="NLC" if transformer else "NCHW",
        )["image_intermediates"][0]
        return found if transformer else found.flatten(2).transpose(1, 2)


def split_tower(text: str) -> tuple[str, str | None]:
    """Split ``model:tag`` into model and pretrained tag; a directory, ``hf-hub:`` and ``local-dir:`` have no tag."""
    if (Path(text) / "open_clip_config.json").is_file():
        text = f"local-dir:{text}"
    if text.startswith(REPOSITORIES) or Path(text).is_dir():
        return text, None
    name, _, tag = text.partition(":")
    return name, tag or None


def tower_config(model: str) -> dict[str, Any]:
    """Return the architecture of a model as a mapping for :class:`VisionTower`, with which a saved model is rebuilt."""
    return _description(model, None)[0]


def _description(model: str | dict[str, Any], pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the architecture as a mapping, and the known ones of ``mean``, ``std`` and ``interpolation``."""
    if isinstance(model, dict):
        return model, {}
    if model.startswith(REPOSITORIES):
        return _repository_config(model)
    if Path(model).is_dir():
        return read_directory(Path(model))
    if model not in open_clip.list_models():
        raise UserError(f'open_clip has no vision model "{model}".{nearest(model, open_clip.list_models())}')
    tags = [pretrained or "", *open_clip.list_pretrained_tags_by_model(model)]
    published = (open_clip.get_pretrained_cfg(model, tag) for tag in tags)
    return _architecture(open_clip.get_model_config(model)), next(filter(None, published), {})


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    quick_gelu = bool(config.get("quick_gelu", False))
    return {**config["vision_cfg"], "embed_dim": config["embed_dim"], "quick_gelu": quick_gelu}


def _square(size: Any, name: str) -> int:
    sides = {*size} if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1:
        raise UserError(f"{name} takes images of {' x '.join(map(str, size))} pixels. Use a tower for square images.")
    return int(sides.pop())


def _build(config: Mapping[str, Any], name: str) -> Any:
    """Build the tower with random weights; unlike ``open_clip.create_model`` also on the meta device."""
    if "transformers" in config:
        return build(config["transformers"])
    fields = dict(config)
    quick_gelu, embed_dim = fields.pop("quick_gelu", False), fields.pop("embed_dim", fields.get("width", 768))
    valid = {field.name for field in dataclasses.fields(open_clip.CLIPVisionCfg)}
    if unknown := sorted(fields.keys() - valid):
        raise UserError(f'{name}: open_clip.CLIPVisionCfg has no field "{unknown[0]}".{nearest(unknown[0], valid)}')
    fields["timm_model_pretrained"] = False  # otherwise timm downloads ImageNet weights
    try:
        return _build_vision_tower(embed_dim, open_clip.CLIPVisionCfg(**fields), quick_gelu)
    except (RuntimeError, ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"{name}: open_clip cannot build this vision tower: {first_line(error)}") from None


def _maps(trunk: Any, size: int, name: str) -> list[tuple[int, int, int]]:
    """Return width, rows and columns of every layer's output for an image of ``size x size``."""
    if isinstance(trunk, PreTrainedModel):
        grid = size // trunk.config.patch_size
        return [(trunk.config.hidden_size, grid, grid)] * trunk.config.num_hidden_layers
    if isinstance(trunk, VisionTransformer):
        return [(trunk.transformer.width, *trunk.grid_size)] * trunk.transformer.layers
    # CNNs round in different ways, so the shapes are measured on a copy on the meta device. ZeRO-3 may already have
    # partitioned the weights, but keeps their shapes.
    empty = {}
    for tensor in (*trunk.parameters(), *trunk.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty[id(tensor)] = torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=dtype, device="meta")
    image = torch.empty(1, 3, size, size, dtype=torch.float32, device="meta")
    try:
        with torch.no_grad():
            found = copy.deepcopy(trunk, empty).forward_intermediates(image, intermediates_only=True)
    except (AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(f"{name} has no maps for images of {size} x {size} pixels: {first_line(error)}") from None
    return [tuple(features.shape[1:]) for features in found["image_intermediates"]]


def _weight_file(model: str, pretrained: str | None) -> str | None:
    """Return the path of the weights, downloaded if necessary; None for random weights."""
    if model.startswith(REPOSITORIES):
        if pretrained:
            raise UserError(f'{model} has its own weights. Leave "{pretrained}" out.')
        return _repository_weights(model)
    if not pretrained:
        return model if Path(model).is_dir() else None
    if open_clip.get_pretrained_cfg(model, pretrained):
        return _download(model, pretrained)
    if Path(pretrained).is_file():
        return pretrained
    if "/" in pretrained or pretrained.endswith(_WEIGHT_SUFFIXES):
        raise UserError(f"There is no weight file {pretrained}. Give an existing path or a tag of open_clip.")
    tags = open_clip.list_pretrained_tags_by_model(model)
    known = f"Its tags are {', '.join(tags)}." if tags else "It has no tags: give a weight file."
    raise UserError(f'{model} has no weights "{pretrained}" in open_clip. {known}')


def _download(model: str, tag: str) -> str:
    weights, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
    vision = config["vision_cfg"]
    transformer = "timm_model_name" not in vision and isinstance(vision["layers"], int)
    if transformer and weights.get("quick_gelu") and not config.get("quick_gelu"):
        raise UserError(
            f'The weights "{tag}" of {model} were trained with QuickGELU, but {model} uses GELU: its tokens would be '
            f"wrong. Use {model}-quickgelu:{tag}"
        )
    repository, _, file = weights.get("hf_hub", "").rpartition("/")
    file = file or HF_SAFE_WEIGHTS_NAME
    what, how = f"{file} of {repository}", f"hf download {repository} {file}"
    if not repository:
        what, how = weights["url"], f"curl -LO {weights['url']}"
    how = f"{how}, or give a file: {model}:/path/to/file"
    return _fetch(lambda: download_pretrained(weights), f'The weights "{tag}" of {model} ({what})', how)


def _fetch(download: Callable[[], str], what: str, how: str) -> str:
    """Return the path of a cached or downloaded file."""
    try:
        return str(download())
    except Exception as error:  # from huggingface_hub, its HTTP client, urllib or the file system
        raise UserError(
            f"{what} is not cached and cannot be downloaded: {first_line(error)} "
            f"Without network access, download it beforehand: {how}"
        ) from None


def _load(trunk: nn.Module, path: str, name: str) -> None:
    """Load the tower's part of a checkpoint without building the text tower."""
    if Path(path).is_dir():
        _load_state(trunk, timm_state(Path(path)), path, name)
        return
    clip = SimpleNamespace(visual=trunk)
    try:
        state = convert_state_dict(clip, load_state_dict(path, weights_only=True))
        resize_pos_embed(state, clip)
        found = {key.removeprefix("visual."): state[key] for key in state if key.startswith("visual.")}
    except Exception as error:  # an invalid file makes torch, safetensors and open_clip raise anything
        raise UserError(
            f"{path} cannot be read as weights of open_clip: {first_line(error)} "
            "Give a state dict written by torch.save or safetensors; other pickled objects are not loaded."
        ) from None
    _load_state(trunk, found, path, name)


def _load_state(trunk: nn.Module, found: dict[str, torch.Tensor], path: str, name: str) -> None:
    given, expected = ({key: list(state[key].shape) for key in state} for state in (found, trunk.state_dict()))
    wrong = [key for key in {**expected, **given} if expected.get(key) != given.get(key)]
    if wrong:
        raise UserError(
            f"{path} does not fit {name}: visual.{wrong[0]} is {given.get(wrong[0], 'absent')} in the file and "
            f"{expected.get(wrong[0], 'absent')} in the model; {len(wrong)} differ. Give the model's own file."
        )
    trunk.load_state_dict(found)


def _repository_config(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the result of :func:`_description` from a repository's ``open_clip_config.json``."""
    path = _repository_file(model, "open_clip_config.json")
    try:
        found = parse_json(path.read_bytes())
        return _architecture(found.get("model_cfg", found)), {**found.get("preprocess_cfg", {})}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a configuration of open_clip: {type(error).__name__} {error}") from None


def _repository_weights(model: str) -> str:
    if model.startswith("hf-hub:"):
        return str(_repository_file(model, HF_WEIGHTS_NAME, HF_SAFE_WEIGHTS_NAME))
    files = [path for path in Path(model.partition(":")[2]).iterdir() if path.suffix in _WEIGHT_SUFFIXES]
    if not files:
        raise UserError(f"{model} has no weights: no file in it ends with {', '.join(_WEIGHT_SUFFIXES)}.")
    order = [(not path.name.startswith("open_clip"), _WEIGHT_SUFFIXES.index(path.suffix), path) for path in files]
    return str(min(order)[-1])


def _repository_file(model: str, file: str, shown: str | None = None) -> Path:
    """Return the path of a repository's file; errors name ``shown`` instead, the file that open_clip prefers."""
    _, _, place = model.partition(":")
    if model.startswith("local-dir:"):
        if not (Path(place) / file).is_file():
            raise UserError(f"{model}: there is no {file} in {place}. Give a directory written by open_clip.")
        return Path(place) / file
    how = f"hf download {place} open_clip_config.json {HF_SAFE_WEIGHTS_NAME}"
    return Path(_fetch(lambda: download_pretrained_from_hf(place, filename=file), f"{model}: {shown or file}", how))
