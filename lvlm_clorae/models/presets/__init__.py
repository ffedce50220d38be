"""Named bases with their weights and training recipe, and the choices for a base. Imports no torch."""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lvlm_clorae.errors import UserError, nearest

FUSIONS = ("concat", "gated")
PROJECTORS = ("linear", "mlp2x_gelu")
ALIGNED = "base"
"""Folder of a run directory with the base whose projector the run has aligned."""

_DIRECTORY = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """A named base, a hub id or a directory in ``lvlm_clorae/models``, with its training settings ``recipe``.

    ``vision`` is open_clip's ``model:tag`` for a base without a tower, or ``none``; ``architecture`` are the fields of
    ``config.json`` that set the shapes, so that no file is needed to describe the base.
    """

    base: str
    vision: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)


@cache
def presets() -> dict[str, Preset]:
    """Return all presets by name."""
    found = {}
    for path in sorted(_DIRECTORY.glob("*.yaml")):
        found[path.stem] = preset = Preset(**yaml.safe_load(path.read_text(encoding="utf-8")))
        local = _DIRECTORY.parent / preset.base
        if local.is_dir():
            found[path.stem] = replace(preset, base=str(local))
    return found


def base_of(model: str) -> str:
    """Return the hub id or directory of a base: a preset's, or the ``base/`` of the run that aligned a projector."""
    if model in presets():
        return presets()[model].base
    aligned = Path(model, ALIGNED)
    return str(aligned) if (aligned / "config.json").is_file() else model


def published_name(model: str) -> str:
    """Return the hub id or absolute path of a base for other tools; the demo base, in this package, keeps its name."""
    base = base_of(model)
    if not Path(base).exists():
        return base
    return model if model in presets() else str(Path(base).resolve())


def preset_recipe(model: str) -> dict[str, Any]:
    """Return a copy of the recipe of a preset; empty for any other model."""
    return dict(presets()[model].recipe) if model in presets() else {}


def check_model(name: str) -> None:
    """Raise UserError unless the name is a preset, a directory, a GGUF file or a hub id."""
    path = Path(name)
    if name in presets() or path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return
    if name.startswith(("/", ".", "~")) or path.suffix == ".gguf":
        raise UserError(
            f"{name}: no such model directory or GGUF file. Give a directory written by save_pretrained, or a preset."
        )
    if "/" not in name:
        hint = nearest(name, presets())
        raise UserError(f'There is no model "{name}": it is not a preset, a directory, or a hub id (OWNER/NAME).{hint}')
