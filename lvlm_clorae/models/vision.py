"""The frozen vision tower, through open_clip: its vision transformers, its ResNets and its towers from timm."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
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

from ..errors import UserError, nearest

REPOSITORIES = ("hf-hub:", "local-dir:")
"""What begins the name of a model that is described by an ``open_clip_config.json`` beside its weights."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


class VisionTower(nn.Module):
    """Patch tokens (of a CNN: cells of the feature map) of one layer, always in eval mode and without gradients.

    Every buffer is part of the state: ``from_pretrained`` builds on the meta device and gives to a buffer that no
    checkpoint holds (EVA's rotary table, Swin's position index) whatever lies in the memory.

    Args:
        model: a name of ``open_clip.list_models()``; ``hf-hub:OWNER/NAME`` or ``local-dir:PATH`` with weights of their
            own; or a mapping of ``open_clip.CLIPVisionCfg`` fields, ``quick_gelu`` (default false) and ``embed_dim``
            (default: the width), as :func:`tower_config` gives it.
        pretrained: a tag of open_clip or a weight file with keys ``visual.*`` (PyTorch or safetensors); None leaves
            the weights to a checkpoint. Weights are read as weights only, and on the meta device not at all.
        layer: index among the blocks of a transformer (-2 is LLaVA's choice) or the stages of a CNN. A ResNet of
            open_clip has five: the stem counts.

    Attributes:
        width: features of a token
        grid: tokens along a side
        image_size: pixels along a side
        preprocess: ``image_size``, ``mean``, ``std`` and ``interpolation`` (``bicubic`` or ``bilinear``) of the
            pretrained tag, or of the repository. Without a tag: of the model's first tag, else OpenAI's.

    Raises:
        UserError: no such model, tag or file; weights that do not fit or cannot be had; a tower without square maps.
    """

    def __init__(self, model: str | dict[str, Any], pretrained: str | None = None, layer: int = -2) -> None:
        super().__init__()
        name = model if isinstance(model, str) else "The tower of the configuration"
        config, settings = _description(model, pretrained)
        weights = None if torch.get_default_device().type == "meta" else _weight_file(name, pretrained)
        self.image_size = _square(config.get("image_size", 224), name)
        self.trunk: Any = _build({**config, "image_size": self.image_size}, name)
        self.eval()
        if weights is not None:
            _load(self.trunk, weights, name)
        for module in self.trunk.modules():
            module._non_persistent_buffers_set.clear()
        maps = _maps(self.trunk, self.image_size, name)
        if not -len(maps) <= layer < len(maps):
            raise UserError(
                f"{name} has the layers 0 to {len(maps) - 1}, counted from its end -1 to -{len(maps)}: not {layer}."
            )
        self.layer = layer % len(maps)
        self.width, self.grid, columns = maps[self.layer]
        if self.grid != columns:
            raise UserError(f"Layer {layer} of {name} gives maps of {self.grid} x {columns}; square ones are needed.")
        self.preprocess = {"image_size": self.image_size, **_normalisation(settings)}

    def train(self, mode: bool = True) -> VisionTower:
        """Stay in eval mode without gradients: the tower is frozen, also where ``from_pretrained`` made its weights."""
        self.requires_grad_(False)
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``pixel_values [B, 3, H, W]`` -> tokens ``[B, grid * grid, width]``, row by row, no class token."""
        transformer = isinstance(self.trunk, VisionTransformer)
        found = self.trunk.forward_intermediates(
            pixel_values,
            indices=[self.layer],
            # open_clip's ResNet has this one upside down: it runs on to its end where it is asked to stop.
            stop_early=not isinstance(self.trunk, ModifiedResNet),
            intermediates_only=True,
            output_fmt="NLC" if transformer else "NCHW",
        )["image_intermediates"][0]
        return found if transformer else found.flatten(2).transpose(1, 2)


def tower_config(model: str) -> dict[str, Any]:
    """The mapping form of a name or repository: plain data from which :class:`VisionTower` makes the same architecture.

    A saved model keeps it instead of the name of a repository, which it then no longer needs.

    Raises:
        UserError: no such model, or its ``open_clip_config.json`` is missing or damaged.
    """
    return _description(model, None)[0]


def _description(model: str | dict[str, Any], pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mapping form, and what is known of ``mean``, ``std`` and ``interpolation``."""
    if isinstance(model, dict):
        return model, {}
    if model.startswith(REPOSITORIES):
        return _repository_config(model)
    if model not in open_clip.list_models():
        raise UserError(f'open_clip has no vision model "{model}".{nearest(model, open_clip.list_models())}')
    tags = [pretrained or "", *open_clip.list_pretrained_tags_by_model(model)]
    published = (open_clip.get_pretrained_cfg(model, tag) for tag in tags)
    return _mapping_form(open_clip.get_model_config(model)), next(filter(None, published), {})


def _mapping_form(config: Mapping[str, Any]) -> dict[str, Any]:
    quick_gelu = bool(config.get("quick_gelu", False))
    return {**config["vision_cfg"], "embed_dim": config["embed_dim"], "quick_gelu": quick_gelu}


def _normalisation(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mean": tuple(settings.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        "std": tuple(settings.get("std") or open_clip.OPENAI_DATASET_STD),
        "interpolation": "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic",
    }


def _square(size: Any, name: str) -> int:
    sides = {*size} if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1:
        raise UserError(f"{name} takes pictures of {' x '.join(map(str, size))} pixels; square ones are needed.")
    return int(sides.pop())


def _build(config: Mapping[str, Any], name: str) -> nn.Module:
    """The tower alone with random weights; unlike ``open_clip.create_model`` also on the meta device."""
    fields = dict(config)
    quick_gelu, embed_dim = fields.pop("quick_gelu", False), fields.pop("embed_dim", fields.get("width", 768))
    valid = {field.name for field in dataclasses.fields(open_clip.CLIPVisionCfg)}
    if unknown := sorted(fields.keys() - valid):
        raise UserError(f'{name}: open_clip.CLIPVisionCfg has no field "{unknown[0]}".{nearest(unknown[0], valid)}')
    fields["timm_model_pretrained"] = False  # timm would fetch weights for ImageNet
    try:
        trunk = _build_vision_tower(embed_dim, open_clip.CLIPVisionCfg(**fields), quick_gelu)
    except (RuntimeError, ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"{name}: open_clip cannot build this vision tower: {_first_line(error)}") from None
    assert isinstance(trunk, nn.Module)
    return trunk


def _maps(trunk: Any, size: int, name: str) -> list[tuple[int, int, int]]:
    """Width, rows and columns of every layer's output, for a picture of ``size x size``."""
    if isinstance(trunk, VisionTransformer):
        return [(trunk.transformer.width, *trunk.grid_size)] * trunk.transformer.layers
    # CNNs round in their own ways: the shapes are measured, on a copy without memory. ZeRO-3 may already have taken the
    # weights away, but not their shapes.
    empty = {
        id(tensor): torch.empty(
            getattr(tensor, "ds_shape", tensor.shape),
            dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype,
            device="meta",
        )
        for tensor in (*trunk.parameters(), *trunk.buffers())
    }
    picture = torch.empty(1, 3, size, size, dtype=torch.float32, device="meta")
    try:
        with torch.no_grad():
            found = copy.deepcopy(trunk, empty).forward_intermediates(picture, intermediates_only=True)
    except (AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"{name} gives no feature maps for pictures of {size} x {size} pixels: {_first_line(error)}"
        ) from None
    return [tuple(features.shape[1:]) for features in found["image_intermediates"]]


def _weight_file(model: str, pretrained: str | None) -> str | None:
    """Where the weights lie, downloaded if need be; None where there are none."""
    if model.startswith(REPOSITORIES):
        if pretrained:
            raise UserError(f'{model} brings its own weights: leave "{pretrained}" out.')
        return _repository_weights(model)
    if not pretrained:
        return None
    if open_clip.get_pretrained_cfg(model, pretrained):
        return _download(model, pretrained)
    if Path(pretrained).is_file():
        return pretrained
    if "/" in pretrained or pretrained.endswith(_WEIGHT_SUFFIXES):
        raise UserError(f"There is no weight file {pretrained}. Give its path, or a tag of open_clip.")
    tags = open_clip.list_pretrained_tags_by_model(model)
    known = nearest(pretrained, tags) or " It has no tag there: give a weight file."
    if "Did you mean" in known:
        known += f" Valid: {', '.join(tags)}."
    raise UserError(f'{model} has no weights "{pretrained}" in open_clip.{known}')


def _download(model: str, tag: str) -> str:
    weights, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
    vision = config["vision_cfg"]
    transformer = "timm_model_name" not in vision and isinstance(vision["layers"], int)
    if transformer and weights.get("quick_gelu") and not config.get("quick_gelu"):
        raise UserError(
            f'The weights "{tag}" of {model} were trained with QuickGELU, which {model} has not: its tokens would be '
            f"wrong. Use {model}-quickgelu:{tag}"
        )
    try:
        return str(download_pretrained(weights))
    except Exception as error:  # of huggingface_hub, its http client, urllib or the file system
        repository, _, file = weights["hf_hub"].rpartition("/")
        file = file or HF_SAFE_WEIGHTS_NAME
        what, how = f"{file} of {repository}", f"hf download {repository} {file}"
        if not repository:
            what, how = weights["url"], f"curl -LO {weights['url']}"
        raise UserError(
            f'The weights "{tag}" of {model} ({what}) are not here and cannot be downloaded: {_first_line(error)} '
            f"Where there is no network fetch them beforehand ({how}) or give a file of them: {model}:/path/to/file"
        ) from None


def _load(trunk: nn.Module, path: str, name: str) -> None:
    """Take the tower's part of a checkpoint; the text tower is not even built."""
    clip = SimpleNamespace(visual=trunk)
    try:
        state = convert_state_dict(clip, load_state_dict(path, weights_only=True))
        resize_pos_embed(state, clip)
        found = {key.removeprefix("visual."): state[key] for key in state if key.startswith("visual.")}
    except Exception as error:  # whatever a foreign file makes torch, safetensors and open_clip raise
        raise UserError(
            f"{path} cannot be read as weights of open_clip: {_first_line(error)} "
            "Give a state dict saved by torch.save or as safetensors; nothing else in a file is ever run."
        ) from None
    expected = trunk.state_dict()
    wrong = [key for key in {**expected, **found} if _shape(expected.get(key)) != _shape(found.get(key))]
    if wrong:
        raise UserError(
            f"{path} holds weights of another model than {name}: visual.{wrong[0]} is {_shape(found.get(wrong[0]))} "
            f"there and {_shape(expected.get(wrong[0]))} here; {len(wrong)} differ in all. Give the model's own file."
        )
    trunk.load_state_dict(found)


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))


def _repository_config(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What :func:`_description` gives, of a repository's ``open_clip_config.json``."""
    path = _repository_file(model, "open_clip_config.json")
    try:
        found = json.loads(path.read_bytes())
        return _mapping_form(found.get("model_cfg", found)), {**found.get("preprocess_cfg", {})}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no configuration of open_clip: {type(error).__name__} {error}") from None


def _repository_weights(model: str) -> str:
    _, _, place = model.partition(":")
    if model.startswith("hf-hub:"):
        return str(_repository_file(model, HF_WEIGHTS_NAME, HF_SAFE_WEIGHTS_NAME))
    files = [path for path in sorted(Path(place).iterdir()) if path.suffix in _WEIGHT_SUFFIXES]
    files = [path for path in files if path.name.startswith("open_clip")] or files
    if not files:
        raise UserError(f"{model} has no weights: no file of {place} ends with {', '.join(_WEIGHT_SUFFIXES)}.")
    return str(min(files, key=lambda path: _WEIGHT_SUFFIXES.index(path.suffix)))


def _repository_file(model: str, file: str, shown: str | None = None) -> Path:
    """A file of the repository; ``shown`` is what to fetch where open_clip prefers another one to ``file``."""
    _, _, place = model.partition(":")
    if model.startswith("local-dir:"):
        if not (Path(place) / file).is_file():
            raise UserError(f"{model}: there is no {file} in {place}. Give a directory written by open_clip.")
        return Path(place) / file
    try:
        return Path(download_pretrained_from_hf(place, filename=file))
    except Exception as error:  # of huggingface_hub or its http client
        raise UserError(
            f"{model}: {shown or file} is not here and cannot be downloaded: {_first_line(error)} Where there is no "
            f"network fetch the model beforehand: hf download {place} open_clip_config.json {HF_SAFE_WEIGHTS_NAME}"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
