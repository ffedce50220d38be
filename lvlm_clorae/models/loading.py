"""From a name to a model and its processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration

from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.models.presets import presets
from lvlm_clorae.models.processor import MARKERS, PREPROCESSOR, Processor
from lvlm_clorae.models.t5 import VisionT5, VisionT5Config
from lvlm_clorae.tasks.schema import REGION

DEFAULT_VISION = "ViT-L-14-quickgelu:openai"


def load_model(
    name_or_path: str,
    *,
    fusion: str = "concat",
    vision: str | None = None,
    dtype: torch.dtype | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
) -> tuple[VisionT5, Processor]:
    """A model and its processor.

    Args:
        name_or_path: a preset, a local directory (written by ``save_pretrained`` of ours, or a plain T5) or a hub id
        fusion: how pictures reach the language model; ``concat`` is built
        vision: ``model:tag`` of open_clip for a base without a tower; the tag may be a local weight file or empty for
            random weights
        dtype: of all weights; default float32
        load_in_8bit, load_in_4bit: quantised language model; not built yet

    Raises:
        UserError: no such model, one of another kind than T5, or an option that is not built.
    """
    if fusion != "concat":
        raise UserError(f'fusion "{fusion}" is not available: only "concat" is.')
    if load_in_8bit or load_in_4bit:
        raise UserError("Quantised bases are not available yet: leave load_in_8bit and load_in_4bit off.")
    preset = presets().get(name_or_path)
    base = preset.base if preset else name_or_path
    config = _read_config(base, name_or_path)
    dtype = dtype or torch.float32
    if config.model_type == VisionT5Config.model_type:
        try:
            model, processor = VisionT5.from_pretrained(base, dtype=dtype), Processor.from_pretrained(base)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{name_or_path}: weights or processor cannot be loaded: {_first_line(error)}") from None
    elif config.model_type == "t5":
        tag = vision or (preset.vision if preset else None) or DEFAULT_VISION
        model, processor = _compose(base, config, tag, dtype)
    else:
        raise UserError(f'{name_or_path} is a "{config.model_type}" model; T5 and FLAN-T5 are supported.')
    model.eval()
    return model, processor


def _read_config(base: str, name: str) -> Any:
    path = Path(base)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{base}: the model directory has no config.json. Give a directory written by save_pretrained.")
    try:
        if path.is_dir():
            json.loads((path / "config.json").read_bytes())
        return AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, AttributeError, TypeError) as error:  # the last two for JSON that is no object
        known = "" if "/" in name else nearest(name, presets())
        raise UserError(
            f'The model "{name}" cannot be loaded: {_first_line(error)}{known} '
            f"A hub model must be fetched beforehand where there is no network: hf download {base}"
        ) from None


def _compose(base: str, config: Any, tag: str, dtype: torch.dtype) -> tuple[VisionT5, Processor]:
    """A plain T5 checkpoint with an open_clip tower and a fresh projector."""
    name, _, pretrained = tag.partition(":")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        language = T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{base}: tokenizer or weights cannot be loaded: {_first_line(error)}") from None
    region = tokenizer.convert_tokens_to_ids(MARKERS[REGION])
    if region is None or region == tokenizer.unk_token_id:
        raise UserError(
            f"{base}: its tokenizer has no {MARKERS[REGION]}, which marks object regions. Use a T5 tokenizer."
        )
    settings = {**config.to_dict(), "vision": {"model": name}, "region_token_id": int(region)}
    settings.pop("model_type", None)
    settings.pop("architectures", None)
    model = VisionT5(VisionT5Config(**settings))
    # Its very modules, not a copy of the weights: a new T5 of transformers has input and output embeddings tied,
    # FLAN-T5 has them apart, and a copy would write one over the other.
    for part, module in language.named_children():
        setattr(model, part, module)
    model.config.tie_word_embeddings = language.lm_head.weight is language.shared.weight
    model.generation_config = language.generation_config
    if pretrained:
        from lvlm_clorae.models.vision import VisionTower

        model.vision_tower = VisionTower(name, pretrained=pretrained)
    return model.to(dtype), Processor(tokenizer, model.vision_tower.image_size)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


__all__ = ["PREPROCESSOR", "load_model"]
