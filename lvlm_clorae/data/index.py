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
from typing import Any

from lvlm_clorae.errors import UserError, nearest

VERSION = 1
SPLITS = ("train", "dev", "test")
INDEX_NAME = "index.json"

_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
# A plain file name, without folder, ".." or root: a shard can only lie beside its index.
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.tar")
_BUILD = "Build shards with: lvlm-clorae shards build --dataset NAME --input DIR --output_dir"


@dataclass(frozen=True)
class ShardEntry:
    """One tar file: name, number of samples, size in bytes, SHA-256, and the byte of each sample's first header."""

    name: str
    samples: int
    bytes: int
    sha256: str
    offsets: Sequence[int] = field(repr=False)
    """Any sequence; kept as an array of eight bytes a sample."""

    def __post_init__(self) -> None:
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
    labels: Mapping[str, Any]
    reference_f1: Mapping[str, float]

    def __post_init__(self) -> None:
        if not _DATASET_NAME.fullmatch(self.name):
            raise UserError(f'"{self.name}" cannot name a dataset: use letters, digits, "_" and "-", at most 40.')


@dataclass(frozen=True)
class DatasetEntry(DatasetSpec):
    """A dataset with its shards, by split; a split without samples is absent."""

    splits: Mapping[str, tuple[ShardEntry, ...]]

    def samples(self, split: str) -> int:
        """Return the number of samples of a split, 0 if it is absent."""
        return sum(shard.samples for shard in self.splits.get(split, ()))


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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{directory}: no {INDEX_NAME} to read ({error.strerror}). {_BUILD} {directory}") from None
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


def decode_index(data: bytes, where: str) -> Index:
    """Decode an index file. Raises UserError, naming ``where``, if it is not JSON, of another version or malformed."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
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
    return Index({name: _dataset(f"{where}: malformed", name, datasets[name]) for name in sorted(datasets)})


def _dataset(where: str, name: str, data: Any) -> DatasetEntry:
    where = f'{where}, dataset "{name}"'
    _require(where, "the name", _DATASET_NAME.fullmatch(name), "letters, digits, _ and -, at most 40")
    _require(where, "it", isinstance(data, dict), "an object")
    task, subtasks, labels, splits = (data.get(key) for key in ("task", "subtasks", "labels", "splits"))
    reference = data.get("reference_f1", {})
    _require(where, "task", isinstance(task, str), "a string")
    _require(where, "subtasks", _are_names(subtasks), "a list of names")
    is_complete = isinstance(labels, dict) and all(_is_label_set(labels.get(subtask)) for subtask in subtasks)
    _require(where, "labels", is_complete, "a label set for each of its sub-tasks")
    are_positive = isinstance(reference, dict) and all(map(_is_positive, reference.values()))
    _require(where, "reference_f1", are_positive, "positive numbers")
    are_known = isinstance(splits, dict) and splits and set(splits) <= set(SPLITS)
    _require(where, "splits", are_known, f"lists of shards for some of {', '.join(SPLITS)}")
    shards = {split: _shards(f'{where}, split "{split}"', splits[split]) for split in SPLITS if split in splits}
    return DatasetEntry(name, task, tuple(subtasks), labels, reference, shards)


def _shards(where: str, data: Any) -> tuple[ShardEntry, ...]:
    _require(where, "it", isinstance(data, list) and data, "a list of shards")
    shards = tuple(_shard(where, item) for item in data)
    _require(where, "shards", len({shard.name for shard in shards}) == len(shards), "different files")
    return shards


def _shard(where: str, data: Any) -> ShardEntry:
    _require(where, "a shard", isinstance(data, dict), "an object")
    name, samples, size, sha256, offsets = (data.get(key) for key in ("name", "samples", "bytes", "sha256", "offsets"))
    is_plain = isinstance(name, str) and _SHARD_NAME.fullmatch(name)
    _require(where, "name", is_plain, f"the plain name of a .tar file in the same directory, not {str(name)[:80]!r}")
    where = f"{where}, shard {name}"
    _require(where, "samples", _is_count(samples) and samples > 0, "a positive integer")
    _require(where, "bytes", _is_count(size) and 0 < size < 1 << 62, "a positive integer")
    is_digest = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)
    _require(where, "sha256", is_digest, "64 hexadecimal digits")
    is_complete = isinstance(offsets, list) and len(offsets) == samples and all(map(_is_count, offsets))
    _require(where, "offsets", is_complete, f"one integer for each of its {samples} samples")
    rising = all(first < second for first, second in pairwise([*offsets, size]))
    _require(where, "offsets", offsets[0] == 0 and rising, f"rising from 0 and below {size}")
    return ShardEntry(name, samples, size, sha256, offsets)


def _require(where: str, key: str, condition: object, form: str) -> None:
    if not condition:
        raise UserError(f"{where}: {key} must be {form}. Build the shards again.")


def _is_label_set(value: object) -> bool:
    return _are_names(value) or (isinstance(value, dict) and bool(value) and all(map(_are_names, value.values())))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
