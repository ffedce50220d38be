"""Where the adapter of a run lies."""

from __future__ import annotations

from pathlib import Path

from lvlm_clorae.errors import UserError

SCHEMA = "schema.json"
"""The file that makes a directory an adapter directory."""


def adapter_directory(path: Path) -> Path:
    """The adapter directory of a run, or `path` itself where it is one. Raises UserError where it is neither."""
    for found in (path / "adapter", path):
        if (found / SCHEMA).is_file():
            return found
    if not path.is_dir():
        raise UserError(f"{path}: no such directory. Give a run directory (runs/...), or its adapter/ folder.")
    if (path / "best" / SCHEMA).is_file():
        raise UserError(
            f"{path}: the run has not ended, so it has no adapter/ yet. Its best so far: --run {path / 'best'}"
        )
    if (path / "config.yaml").is_file():
        raise UserError(f"{path}: the run has not ended, so it has no adapter/ yet. Go on with it by --resume auto.")
    raise UserError(f"{path}: is no run and no adapter directory (there is no {SCHEMA}). Give one that train.py wrote.")
