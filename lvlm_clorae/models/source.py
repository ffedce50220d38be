"""Where a base comes from: the name a user gives, its configuration, and clear words where a file is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ..errors import UserError, nearest
from .causal import VisionCausalConfig
from .presets import Preset, presets
from .t5 import VisionT5Config

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
OWN = (VisionT5Config.model_type, VisionCausalConfig.model_type)
"""Models with tower and projector inside, as ``save_pretrained`` of ours writes them."""


@dataclass(frozen=True)
class Source:
    """A base that can be loaded.

    Args:
        name: as the user wrote it
        base: the directory or hub id of its files
        config: its configuration, read from them
        preset: where the name is one
    """

    name: str
    base: str
    config: Any
    preset: Preset | None

    @property
    def family(self) -> str:
        """How it is loaded: ``own``, ``t5``, ``llava``, ``image_text`` or ``causal``.

        Raises:
            UserError: it is no model that writes text.
        """
        return family_of(self.config, self.name)


def find_source(name: str, *, described: bool = False) -> Source:
    """The source of a preset, a local directory or a hub id.

    Args:
        described: a preset's own description of the architecture is enough: nothing is read

    Raises:
        UserError: there is none, or its ``config.json`` is missing or not valid.
    """
    preset = presets().get(name)
    base = preset.base if preset else name
    if described and preset and preset.architecture:
        return Source(name, base, AutoConfig.for_model(**preset.architecture), preset)
    path = Path(base)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{base}: the model directory has no config.json. Give a directory written by save_pretrained.")
    try:
        if path.is_dir():
            json.loads((path / "config.json").read_bytes())
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, AttributeError, TypeError) as error:  # the last two for JSON that is no object
        raise cannot_load(name, base, error) from None
    return Source(name, base, config, preset)


def family_of(config: Any, name: str) -> str:
    """See :attr:`Source.family`."""
    kind = config.model_type
    if kind in OWN:
        return "own"
    if kind == "t5":
        return "t5"
    if kind == "llava" and is_plain_llava(config):
        return "llava"
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "image_text"
    # transformers has a causal form of BERT too: what the checkpoint was trained as decides.
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if causal is not None and causal in (config.architectures or [causal]):
        return "causal"
    raise UserError(
        f'{name} is a "{kind}" model, which writes no text. Supported: T5 and FLAN-T5, causal language models, '
        "LLaVA-1.5 and the other image-text-to-text models of transformers."
    )


def is_plain_llava(config: Any) -> bool:
    """Whether a LLaVA is LLaVA-1.5's kind: the patches of one layer of a CLIP tower through an MLP of two layers."""
    return (
        config.vision_config.model_type == "clip_vision_model"
        and isinstance(config.vision_feature_layer, int)
        and config.vision_feature_select_strategy == "default"
        and config.projector_hidden_act == "gelu"
        and config.multimodal_projector_bias
    )


def cannot_load(name: str, base: str, error: BaseException) -> UserError:
    """What to tell the user of a base that transformers could not load: what is missing, and how to get it."""
    reason = first_line(error)
    if Path(base).is_dir():
        return UserError(f"{name}: the model cannot be loaded: {reason}")
    known = "" if "/" in name else nearest(name, presets())
    missing = ", ".join(missing_files(base))
    lacking = f" Not here: {missing}." if missing else ""
    return UserError(
        f'The model "{name}" cannot be loaded: {reason}{known}{lacking} '
        f"Where there is no network it must be fetched beforehand: hf download {base}"
    )


def missing_files(repository: str) -> list[str]:
    """The files of a hub repository that loading needs and the local cache lacks, as far as they can be known."""

    def cached(name: str) -> str | None:
        try:
            found = try_to_load_from_cache(repository, name)
        except ValueError:  # no valid repository name
            return None
        return found if isinstance(found, str) else None

    missing = [] if cached("config.json") else ["config.json"]
    if not any(map(cached, ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json"))):
        missing.append("tokenizer.json")
    index = cached(WEIGHTS_INDEX)
    if index:
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        missing += [name for name in shards if not cached(name)]
    elif not cached(WEIGHTS):
        missing.append(WEIGHTS)
    return missing


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
