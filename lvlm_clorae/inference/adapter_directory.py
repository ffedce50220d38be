"""The adapter directory: where a run keeps it, and its schema file. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from lvlm_clorae.errors import UserError

SCHEMA = "schema.json"
"""The file that makes a directory an adapter directory."""
SCHEMA_VERSION = 2

_KEYS = {"base", "adapter", "tasks", "dataset_tasks", "max_source_length", "max_target_length"}


def adapter_directory(path: Path) -> Path:
    """Return the adapter directory of a run that has ended, or ``path`` itself if it is one; else raise UserError."""
    for found in (path / "adapter", path):
        if (found / SCHEMA).is_file():
            return found
    if not path.is_dir():
        raise UserError(f"{path}: no such directory. Give a run directory (runs/...) or its adapter/ folder.")
    if (path / "best" / SCHEMA).is_file():
        raise UserError(f"{path}: the run has not ended and has no adapter/ yet. Use its best: --run {path / 'best'}")
    if (path / "config.yaml").is_file():
        raise UserError(f"{path}: the run has not ended, or has failed (status.json), and has no adapter/. Resume it.")
    raise UserError(f"{path}: not a run or an adapter directory (no {SCHEMA}). Give one written by train.py.")


def read_schema(path: Path) -> dict[str, Any]:
    """Read and check the schema of an adapter directory: base, adapter method, tasks, label sets, lengths."""
    file = path / SCHEMA
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file. Give a run's adapter/ or best/ folder.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}).") from None
    version = schema.get("version") if isinstance(schema, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{file}: format version {version}, not {SCHEMA_VERSION}. Export the adapter again.")
    if missing := sorted(_KEYS - set(schema)):
        raise UserError(f"{file}: has no {', '.join(missing)}. Export the adapter again.")
    return dict(schema)
