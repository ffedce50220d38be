"""The adapter directory: where a run keeps it, and its schema file. Imports no torch."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictInt, TypeAdapter, ValidationError

from lvlm_clorae.digests import check_digests
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import parse_json, validation_error
from lvlm_clorae.models.presets import ALIGNED, FUSIONS, PROJECTORS
from lvlm_clorae.tasks.schema import label_sets

logger = logging.getLogger(__name__)

SCHEMA = "schema.json"
"""The file that makes a directory an adapter directory."""
SCHEMA_VERSION = 4
WEIGHTS = "adapter_model.safetensors"

_Name = Annotated[str, Field(min_length=1, max_length=4096)]
_Length = Annotated[StrictInt, Field(ge=1, le=1 << 20)]


@dataclass(frozen=True)
class _BaseOptions:
    """Arguments of ``load_model``; ``dtype`` is a name."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    fusion: Literal[FUSIONS] = "concat"  # type: ignore[valid-type]
    vision: str | None = None
    vision_layer: StrictInt | None = None
    projector: Literal[PROJECTORS] | None = None  # type: ignore[valid-type]
    template: str | None = None
    load_in_8bit: StrictBool = False
    load_in_4bit: StrictBool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class _DatasetTask:
    dataset: _Name
    task: _Name
    subtask: str
    labels: Any

    def __post_init__(self) -> None:
        label_sets(self.subtask, self.labels)


@dataclass(frozen=True)
class _Schema:
    base: _Name
    base_fingerprint: dict[str, str]
    adapter: _Name
    tasks: Annotated[list[_Name], Field(min_length=1)]
    dataset_tasks: Annotated[dict[str, _DatasetTask], Field(min_length=1)]
    max_source_length: _Length
    max_target_length: _Length
    base_options: _BaseOptions = field(default_factory=_BaseOptions)


_SCHEMA = TypeAdapter(_Schema)


def adapter_directory(path: Path) -> Path:
    """Return the adapter directory of a run that has ended, or ``path`` itself if it is one; else raise UserError."""
    for found in (path / "adapter", path):
        if (found / SCHEMA).is_file():
            return found
    if not path.is_dir():
        raise UserError(f"{path}: no such directory. Give a run directory (runs/...) or its adapter/ folder.")
    if (path / "best" / SCHEMA).is_file():
        raise UserError(f"{path}: the run has not ended and has no adapter/ yet. Use its best: --run {path / 'best'}")
    if (path / ALIGNED).is_dir():
        raise UserError(f"{path}: holds an aligned base and no adapter. Train one: train.py --model {path}")
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
    if not file.is_file():
        raise UserError(f"{file}: no such file. Give a run's adapter/ or best/ folder.")
    try:
        schema = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}).") from None
    version = schema.get("version") if isinstance(schema, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{file}: format version {str(version)[:20]}, not {SCHEMA_VERSION}. Export the adapter again.")
    try:
        _SCHEMA.validate_python(schema)
    except ValidationError as error:
        raise validation_error(f"{file}: malformed", error, "Copy it again, or export the adapter again.") from None
    return dict(schema)
