"""The adapter directory: where a run keeps it, and its schema file. Imports no torch."""

import logging
from pathlib import Path
from typing import Any

from lvlm_clorae.digests import check_digests
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import parse_json

logger = logging.getLogger(__name__)

SCHEMA = "schema.json"
"""The file that makes a directory an adapter directory."""
SCHEMA_VERSION = 3
WEIGHTS = "adapter_model.safetensors"

_KEYS = {"base", "base_fingerprint", "adapter", "tasks", "dataset_tasks", "max_source_length", "max_target_length"}


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


def check_files(path: Path) -> None:
    """Raise UserError if a file of an adapter directory is not as it was written; an edited README.md is a warning."""
    try:
        changed = check_digests(path, may_differ=("README.md",))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the adapter directory is damaged ({error}). Copy it again.") from None
    for name in changed:
        logger.warning("%s has been edited since the adapter was exported", path / name)


def read_schema(path: Path) -> dict[str, Any]:
    """Read and check the schema of an adapter directory: base, adapter method, tasks, label sets, lengths."""
    file = path / SCHEMA
    try:
        schema = parse_json(file.read_bytes())
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
