"""index.json: which datasets a directory of shards holds, and where each sample starts (docs/architecture.md).

Everything a reader relies on is checked here, once, so that a shard that is missing or was cut off in copying is
reported at the start of a run and not in its third epoch.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from lvlm_clorae.errors import UserError, nearest

VERSION = 1
SPLITS = ("train", "dev", "test")
INDEX_NAME = "index.json"

_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
# A plain file name: no folder, no "..", nothing absolute, so a shard can lie nowhere but beside its index.
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.tar")
_BUILD = "Build shards with: lvlm-clorae shards build --dataset NAME --input DIR --output"


@dataclass(frozen=True)
class ShardEntry:
    """One tar file: its name, samples, size in bytes, SHA-256, and the byte at which each sample's first header is."""

    name: str
    samples: int
    bytes: int
    sha256: str
    offsets: Sequence[int] = field(repr=False)
    """Whatever sequence it is made of, kept as an array: eight bytes a sample."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", array("Q", self.offsets))


@dataclass(frozen=True)
class DatasetSpec:
    """What a dataset is, whatever its samples: its task, sub-tasks, labels and reference F1 in percent (METHOD 3).

    `labels` maps a sub-task to its list of names, and ``argument`` to ``{"types": [...], "roles": [...]}``.
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
        """How many samples the split has, 0 where it is absent."""
        return sum(shard.samples for shard in self.splits.get(split, ()))


@dataclass(frozen=True)
class Index:
    """The datasets of one directory, by name in sorted order."""

    datasets: Mapping[str, DatasetEntry]

    def dataset(self, name: str) -> DatasetEntry:
        """The dataset of that name. Raises UserError, with the nearest name, where there is none."""
        if name not in self.datasets:
            raise UserError(f'There is no dataset "{name}" in the index.{nearest(name, self.datasets)}')
        return self.datasets[name]

    def units(self, split: str) -> list[str]:
        """``dataset/sub-task`` of every dataset that has samples in `split`, in the index's order."""
        return [
            f"{name}/{subtask}"
            for name, dataset in self.datasets.items()
            if dataset.samples(split)
            for subtask in dataset.subtasks
        ]


def load_index(directory: Path, check_files: bool = True) -> Index:
    """Read and check ``directory/index.json``; with `check_files` also that each shard is there in its full size.

    Raises UserError where the directory, the index or a shard is missing, the index is not JSON, of another version,
    malformed or without datasets, or a shard has another size than the index says.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory. {_BUILD} {directory}")
    path = directory / INDEX_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{directory}: no {INDEX_NAME} in it, so no shards. {_BUILD} {directory}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    index = decode_index(data, str(path))
    if check_files:
        for dataset in index.datasets.values():
            for shards in dataset.splits.values():
                for shard in shards:
                    fault = file_fault(directory, shard)
                    if fault:
                        raise UserError(f"{directory / shard.name}: {fault}. Copy it again, or build the shards again.")
    return index


def decode_index(data: bytes, where: str) -> Index:
    """The index of a file's bytes; `where` begins each message. Raises UserError as :func:`parse_index`."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}). Copy it again, or build the shards again.") from None
    return parse_index(content, where)


def file_fault(directory: Path, shard: ShardEntry) -> str | None:
    """Why the shard's file is not what the index says, from its size alone; None where it is."""
    path = directory / shard.name
    if not path.is_file():
        return "the shard is missing"
    size = path.stat().st_size
    return None if size == shard.bytes else f"has {size} bytes where {INDEX_NAME} says {shard.bytes}"


def parse_index(data: object, where: str) -> Index:
    """The index of decoded JSON; `where` (a path or URL) begins each message. Raises UserError for any other form."""
    if not isinstance(data, dict) or "version" not in data:
        raise UserError(f'{where}: not an index of shards (no "version").')
    if data["version"] != VERSION:
        raise UserError(
            f"{where}: format version {data['version']!r}, but this program reads version {VERSION}. "
            "Build the shards again, or install the release that wrote them."
        )
    datasets = data.get("datasets")
    if not isinstance(datasets, dict):
        raise UserError(f'{where}: malformed, "datasets" must be an object.')
    if not datasets:
        raise UserError(f"{where}: no datasets in it. {_BUILD} DIR")
    try:
        return Index({name: _dataset(name, datasets[name]) for name in sorted(datasets)})
    except _Malformed as error:
        raise UserError(f"{where}: malformed, {error}. Build the shards again.") from None


def index_json(index: Index) -> str:
    """The text of index.json: the same index gives the same text, with each list of offsets on one line."""
    datasets = {
        name: {
            "task": dataset.task,
            "subtasks": list(dataset.subtasks),
            "labels": dataset.labels,
            "reference_f1": dict(dataset.reference_f1),
            "splits": {
                split: [{**vars(shard), "offsets": list(shard.offsets)} for shard in shards]
                for split, shards in dataset.splits.items()
            },
        }
        for name, dataset in index.datasets.items()
    }
    text = json.dumps({"version": VERSION, "datasets": datasets}, sort_keys=True, ensure_ascii=False, indent=1)
    return re.sub(r"(?<=\d,)\s+(?=\d)", " ", text) + "\n"


class _Malformed(ValueError):
    """An entry of the index has another form; the message names it."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Malformed(message)


def _dataset(name: str, data: object) -> DatasetEntry:
    where = f'dataset "{name}"'
    _require(_DATASET_NAME.fullmatch(name) is not None, f"{where} has a name that is not allowed")
    if not isinstance(data, dict):
        raise _Malformed(f"{where} must be an object")
    task, subtasks, labels, splits = (data.get(key) for key in ("task", "subtasks", "labels", "splits"))
    reference = data.get("reference_f1", {})
    if not isinstance(task, str):
        raise _Malformed(f'{where}: "task" must be a string')
    if not (isinstance(subtasks, list) and subtasks and all(isinstance(item, str) for item in subtasks)):
        raise _Malformed(f'{where}: "subtasks" must be a list of names')
    if not (isinstance(labels, dict) and all(_is_label_set(labels.get(subtask)) for subtask in subtasks)):
        raise _Malformed(f'{where}: "labels" must give a label set for each of its sub-tasks')
    if not (isinstance(reference, dict) and all(_is_positive(value) for value in reference.values())):
        raise _Malformed(f'{where}: "reference_f1" must give positive numbers')
    if not (isinstance(splits, dict) and splits):
        raise _Malformed(f'{where}: "splits" must be an object with at least one split')
    unknown = sorted(set(splits) - set(SPLITS))
    _require(not unknown, f"{where}: its splits {unknown} are not among {', '.join(SPLITS)}")
    shards = {split: _shards(where, split, splits[split]) for split in SPLITS if split in splits}
    return DatasetEntry(name, task, tuple(subtasks), labels, reference, shards)


def _shards(where: str, split: str, data: object) -> tuple[ShardEntry, ...]:
    where = f'{where}, split "{split}"'
    if not (isinstance(data, list) and data):
        raise _Malformed(f"{where} must be a list of shards")
    shards = tuple(_shard(where, item) for item in data)
    _require(len({shard.name for shard in shards}) == len(shards), f"{where} lists a shard twice")
    return shards


def _shard(where: str, data: object) -> ShardEntry:
    if not isinstance(data, dict):
        raise _Malformed(f"{where}: a shard must be an object")
    name, samples, size, sha256, offsets = (data.get(key) for key in ("name", "samples", "bytes", "sha256", "offsets"))
    if not (isinstance(name, str) and _SHARD_NAME.fullmatch(name)):
        raise _Malformed(f"{where}: {str(name)[:80]!r} is no plain name of a .tar file in the same directory")
    where = f"{where}, shard {name}"
    if not (_is_count(samples) and _is_count(size) and samples > 0 and size < 1 << 62):
        raise _Malformed(f'{where}: "samples" and "bytes" must be positive whole numbers')
    if not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise _Malformed(f'{where}: "sha256" must be 64 hexadecimal digits')
    if not (isinstance(offsets, list) and len(offsets) == samples and all(map(_is_count, offsets))):
        raise _Malformed(f'{where}: "offsets" must be one whole number for each of its {samples} samples')
    rising = all(first < second for first, second in zip(offsets, [*offsets[1:], size], strict=True))
    _require(offsets[0] == 0 and rising, f'{where}: "offsets" must rise from 0 and stay below {size}')
    return ShardEntry(name, samples, size, sha256, offsets)


def _is_label_set(value: object) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(names, list) and _is_label_set(names) for names in value.values())
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0
