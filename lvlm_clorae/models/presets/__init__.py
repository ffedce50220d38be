"""Named bases: where their weights are and the training recipe that suits them. Reads YAML only, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """A named base.

    Args:
        base: a hub id, or a directory relative to ``lvlm_clorae/models``
        vision: open_clip model and pretrained tag as ``model:tag``; None where the base brings its tower
        recipe: settings of the training configuration that replace its defaults
        architecture: what its ``config.json`` says of its shape, so that it can be described without a file of it
    """

    base: str
    vision: str | None
    recipe: dict[str, Any]
    architecture: dict[str, Any]


@cache
def presets() -> dict[str, Preset]:
    """All presets by name."""
    found = {}
    for path in sorted(_HERE.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        local = _HERE.parent / content["base"]
        base = str(local) if local.is_dir() else content["base"]
        found[path.stem] = Preset(
            base, content.get("vision"), content.get("recipe") or {}, content.get("architecture") or {}
        )
    return found


def preset_recipe(model: str) -> dict[str, Any]:
    """The recipe of a preset; empty for a model that is none."""
    preset = presets().get(model)
    return dict(preset.recipe) if preset else {}
