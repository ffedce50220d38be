"""index.json: the datasets of a directory of shards, and where each sample starts (docs/architecture.md).

Everything a reader relies on is checked here, once, so a shard that is missing or was truncated in copying is reported
at the start of a run and not in its third epoch.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictFloat, StrictInt, TypeAdapter, ValidationError

from lvlm_clorae.digests import sha256_of
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.files import file_errors, parse_json, validation_error
from lvlm_clorae.tasks.schema import is_label, is_task_name, label_sets, subtasks_of

VERSION = 1
SPLITS = ("train", "dev", "test")
INDEX_NAME = "index.json"

# A plain file name, without folder, ".." or root: a shard can only lie beside its index.
_SHARD_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*\.tar$"
_SPLIT = f"^({'|'.join(SPLITS)})$"
_Size = Annotated[int, Field(strict=True, gt=0, lt=1 << 62)]
Names = Annotated[list[str], Field(min_length=1)]
Percentage = Annotated[StrictFloat | StrictInt, Field(gt=0, le=100)]
_BUILD = "Build shards with: lvlm-clorae shards build --dataset NAME --input DIR --output_dir"


@dataclass(frozen=True)
class ShardEntry:
    """One tar file: name, number of samples, size in bytes, SHA-256, and the byte of each sample's first header.

    ``images`` is the number of samples with an image, None in an index of an earlier release.
    """

    name: Annotated[str, Field(pattern=_SHARD_NAME)]
    samples: _Size
    bytes: _Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    offsets: Sequence[StrictInt] = field(repr=False)
    """Any sequence; kept as an array of eight bytes a sample."""
    images: Annotated[int, Field(strict=True, ge=0)] | None = None

    def __post_init__(self) -> None:
        starts = [*self.offsets, self.bytes]
        if len(starts) != self.samples + 1 or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"offsets must be one for each sample, rising from 0 and below {self.bytes}")
        object.__setattr__(self, "offsets", array("Q", self.offsets))


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset without its samples.

    Args:
        name: letters, digits, ``_`` and ``-``, at most 40
        task: selects the expert
        subtasks: what is asked of each sample
        labels: sub-task -> list of names; for ``argument`` ``{"types": [...], "roles": [...]}``
        reference_f1: sub-task -> reference F1 in percent, for the achievement loss
    """

    name: str
    task: str
    subtasks: tuple[str, ...]
    labels: Mapping[str, Names | Mapping[str, Names]]
    reference_f1: Mapping[str, Percentage]

    def __post_init__(self) -> None:
        if not is_task_name(self.name):
            raise UserError(f'"{self.name}" cannot name a dataset: use letters, digits, "_" and "-", at most 40.')


@dataclass(frozen=True)
class DatasetEntry(DatasetSpec):
    """A dataset with its shards, by split; a split without samples is absent."""

    splits: Annotated[
        Mapping[Annotated[str, Field(pattern=_SPLIT)], Annotated[tuple[ShardEntry, ...], Field(min_length=1)]],
        Field(min_length=1),
        AfterValidator(lambda splits: {split: splits[split] for split in SPLITS if split in splits}),
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_task_name(self.task):
            raise UserError(f'task must be a name of letters, digits, "_" and "-", not "{self.task}"')
        possible = subtasks_of(self.task)
        for subtask in self.subtasks:
            if subtask not in possible:
                raise UserError(f'unknown sub-task "{subtask}".{nearest(subtask, possible)}')
        if not self.subtasks or len(set(self.subtasks)) < len(self.subtasks):
            raise UserError(f"subtasks must be different ones of the task: {', '.join(possible)}")
        if not set(self.reference_f1) <= set(possible):
            raise UserError(f"reference_f1 must be of the task's sub-tasks: {', '.join(possible)}")
        if not all(_is_label_set(subtask, self.labels.get(subtask)) for subtask in self.subtasks):
            raise UserError("labels must have lists of different label names for each of its sub-tasks")
        names = [shard.name for shards in self.splits.values() for shard in shards]
        if len(set(names)) < len(names):
            raise UserError("splits must be lists of different shards")

    def samples(self, split: str) -> int:
        """Return the number of samples of a split, 0 if it is absent."""
        return sum(shard.samples for shard in self.splits.get(split, ()))


def _is_label_set(subtask: str, labels: Any) -> bool:
    try:
        sets = label_sets(subtask, labels).values()
    except UserError:
        return False
    return all(names and len(set(names)) == len(names) and all(map(is_label, names)) for names in sets)


_ENTRY = TypeAdapter(DatasetEntry)


@dataclass(frozen=True)
class DatasetTask:
    """A dataset and one of its sub-tasks: what is sampled, weighted and scored; ``name`` is ``dataset/subtask``."""

    name: str
    dataset: str
    subtask: str
    task: str
    labels: Any
    reference_f1: float | None


@dataclass(frozen=True)
class Index:
    """The datasets of one directory, sorted by name."""

    datasets: Mapping[str, DatasetEntry]

    def dataset(self, name: str) -> DatasetEntry:
        """Return a dataset. Raises UserError, with the nearest name, if there is none of that name."""
        if name not in self.datasets:
            raise UserError(f'There is no dataset "{name}" in the index.{nearest(name, self.datasets)}')
        return self.datasets[name]

    def dataset_tasks(self, split: str) -> dict[str, DatasetTask]:
        """Return every dataset task that has samples in ``split``, by name, in the index's order."""
        return {
            f"{name}/{subtask}": DatasetTask(
                f"{name}/{subtask}", name, subtask, entry.task, entry.labels[subtask], entry.reference_f1.get(subtask)
            )
            for name, entry in self.datasets.items()
            if entry.samples(split)
            for subtask in entry.subtasks
        }

    def count_images(self, *splits: str) -> str:
        """Return how many of the samples of the splits, by default of all, have an image: ``3998 of 4000``."""
        found = [entry.splits.get(split, ()) for entry in self.datasets.values() for split in splits or SPLITS]
        shards = [shard for group in found for shard in group]
        known = [shard.images for shard in shards if shard.images is not None]
        images = sum(known) if len(known) == len(shards) else "an unknown number"
        return f"{images} of {sum(shard.samples for shard in shards)}"

    def to_json(self) -> str:
        """Return the text of index.json: equal for equal indexes, with each list of offsets on one line."""
        datasets = {
            name: {key: getattr(dataset, key) for key in ("task", "subtasks", "labels", "reference_f1", "splits")}
            for name, dataset in self.datasets.items()
        }
        text = json.dumps(
            {"version": VERSION, "datasets": datasets},
            default=lambda value: list(value) if isinstance(value, array) else vars(value),
            sort_keys=True,
            ensure_ascii=False,
            indent=1,
        )
        return re.sub(r"(?<=\d,)\s+(?=\d)", " ", text) + "\n"


def load_index(directory: Path, check_files: bool = True) -> Index:
    """Read and check ``directory/index.json`` and, with ``check_files``, that each shard exists in its full size.

    Raises UserError if the directory, the index or a shard is missing, or the index is invalid (:func:`decode_index`).
    """
    path = directory / INDEX_NAME
    if not path.exists() and (below := sorted(directory.glob(f"*/{INDEX_NAME}"))):
        raise UserError(f"{directory}: has no {INDEX_NAME}, but {below[0].parent} has. Give that directory.")
    with file_errors(f"{directory}: no {INDEX_NAME} to read", f"{_BUILD} {directory}"):
        data = path.read_bytes()
    index = decode_index(data, str(path))
    for dataset in index.datasets.values() if check_files else ():
        for shard in (shard for shards in dataset.splits.values() for shard in shards):
            if fault := file_fault(directory, shard):
                raise UserError(f"{directory / shard.name}: {fault}. Copy it again, or build the shards again.")
    return index


def file_fault(directory: Path, shard: ShardEntry) -> str | None:
    """Return why a shard's file cannot be the one in the index, judged by its size; None if it can."""
    path = directory / shard.name
    if not path.is_file():
        return "the shard is missing"
    size = path.stat().st_size
    return None if size == shard.bytes else f"has {size} bytes where {INDEX_NAME} says {shard.bytes}"


def content_fault(directory: Path, shard: ShardEntry) -> str | None:
    """Return why the bytes of a shard's file, all of which are read, are not those in the index; None if they are."""
    try:
        with open(directory / shard.name, "rb") as handle:
            is_equal = sha256_of(handle) == shard.sha256
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if is_equal else f"its SHA-256 differs from {INDEX_NAME}: the bytes have changed"


def decode_index(data: bytes, where: str) -> Index:
    """Decode an index file. Raises UserError, naming ``where``, if it is not JSON, of another version or malformed."""
    try:
        content = parse_json(data)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}). Copy it again, or build the shards again.") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise UserError(
            f"{where}: format version {version!r}, but this release reads version {VERSION}. "
            "Build the shards again, or install the release that wrote them."
        )
    datasets = content.get("datasets")
    if not isinstance(datasets, dict) or not datasets:
        raise UserError(f"{where}: has no datasets. {_BUILD} DIR")
    found = {}
    for name in sorted(datasets):
        entry = datasets[name]
        if isinstance(entry, dict):
            entry = {"reference_f1": {}, **entry, "name": name}
        try:
            found[name] = _ENTRY.validate_python(entry)
        except ValidationError as error:
            raise validation_error(f'{where}: malformed, dataset "{name}"', error, "Build the shards again.") from None
    return Index(found)
