"""Is a directory of shards whole and sound? Everything is read and everything wrong is listed, with shard and key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvlm_clorae.data.pictures import load_picture
from lvlm_clorae.data.shards import (
    DatasetEntry,
    Record,
    ShardEntry,
    decode_sample,
    file_fault,
    image_extension,
    load_index,
    read_records,
    sha256_of,
)
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks.schema import missing_annotations

BOX_TOLERANCE = 2.0
"""Pixels by which a box may reach outside its picture. Annotation tools count pixels from 0 or from 1 and round;
more than that means that the picture is not the one that was annotated, or was resized."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, in which shard, and with which sample (no key: with the shard itself)."""

    shard: str
    key: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.shard}, {self.key}: {self.message}" if self.key else f"{self.shard}: {self.message}"


@dataclass
class Report:
    """What was read, and what is wrong with it. `overshoots` counts boxes outside by no more than `BOX_TOLERANCE`."""

    shards: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    missing_pictures: int = 0
    boxes: int = 0
    overshoots: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, shard: str, key: str | None, message: str) -> None:
        self.problems.append(Problem(shard, key, message))


def verify(directory: Path) -> Report:
    """Read every shard that the index names and check it against the index and the format.

    Per shard: present, size, SHA-256, number and offsets of samples. Per sample: JSON sound (`check_sample`), of the
    dataset's name, task and labels, key used once in its split, picture decodable by Pillow within its limit for
    decompression bombs, boxes inside the picture up to `BOX_TOLERANCE`. Also named: .tar files the index does not know.

    Raises UserError only where there is no index to verify against (see `load_index`).
    """
    index = load_index(directory, check_files=False)
    report = Report()
    known = set()
    for dataset in index.datasets.values():
        for split, shards in dataset.splits.items():
            keys: set[str] = set()
            for shard in shards:
                known.add(shard.name)
                report.shards += 1
                _verify_shard(directory, dataset, split, shard, keys, report)
    for path in sorted(directory.glob("*.tar")):
        if path.name not in known:
            report.add(path.name, None, "is not in the index (left by an interrupted build?)")
    return report


def unknown_labels(sample: Mapping[str, Any], labels: Mapping[str, Any]) -> list[str]:
    """``sub-task "label"`` of each label in a sound sample that is not in the dataset's label sets, sorted."""
    events = sample.get("events") or []
    relation = sample.get("relation")
    argument = labels.get("argument", {})
    used = [("entity", entity["type"], labels.get("entity")) for entity in sample.get("entities") or []]
    used += [("relation", relation["label"], labels.get("relation"))] if relation else []
    used += [("trigger", event["type"], labels.get("trigger")) for event in events]
    used += [("argument", event["type"], argument.get("types")) for event in events]
    used += [("argument", item["role"], argument.get("roles")) for event in events for item in event["arguments"]]
    return sorted({f'{subtask} "{name}"' for subtask, name, known in used if known is not None and name not in known})


def _verify_shard(
    directory: Path, dataset: DatasetEntry, split: str, shard: ShardEntry, keys: set[str], report: Report
) -> None:
    fault = file_fault(directory, shard)
    if fault:
        report.add(shard.name, None, fault)
    if not (directory / shard.name).is_file():
        return
    with open(directory / shard.name, "rb") as handle:
        if sha256_of(handle) != shard.sha256:
            report.add(shard.name, None, "its SHA-256 is not the one in the index: the bytes have changed")
        handle.seek(0)
        offsets = []
        try:
            for record in read_records(handle, shard.name):
                offsets.append(record.offset)
                for message in _record_faults(record, dataset, report):
                    report.add(shard.name, record.key, message)
                if record.key in keys:
                    report.add(shard.name, record.key, "the key is used twice in its split")
                keys.add(record.key)
        except UserError as error:
            report.add(shard.name, None, str(error).removeprefix(f"{shard.name}: ").removeprefix(f"{shard.name}, "))
    report.samples[f"{dataset.name}/{split}"] += len(offsets)
    if len(offsets) != shard.samples:
        report.add(shard.name, None, f"has {len(offsets)} samples where the index says {shard.samples}")
    elif offsets != list(shard.offsets):
        report.add(shard.name, None, "its samples start at other offsets than the index says")


def _record_faults(record: Record, dataset: DatasetEntry, report: Report) -> Iterator[str]:
    try:
        sample = decode_sample(record.json, "JSON")
    except UserError as error:
        yield str(error)
        return
    for name, value in (("dataset", dataset.name), ("task", dataset.task)):
        if sample[name] != value:
            yield f'its {name} is "{sample[name]}", not the shard\'s "{value}"'
    missing = missing_annotations(sample, dataset.subtasks)
    if missing:
        yield f"lacks {' and '.join(missing)}, which its dataset's sub-tasks ask for"
    unknown = unknown_labels(sample, dataset.labels)
    if unknown:
        yield f"labels that the index does not have: {', '.join(unknown)}"
    boxes = [(item["id"], item["box"]) for item in sample.get("objects") or []]
    report.boxes += len(boxes)
    if record.image is None:
        report.missing_pictures += sample.get("image") is not None
        return
    report.pictures += 1
    if sample.get("image") is None:
        yield 'has a picture, but its "image" is null'
    try:
        width, height = decoded_size(record.image)
    except ValueError as error:
        yield str(error)
        return
    for name, (x1, y1, x2, y2) in boxes:
        outside = max(-x1, -y1, x2 - width, y2 - height)
        if outside > BOX_TOLERANCE:
            where = f"outside the {width}x{height} picture (was it resized?)"
            yield f"{name} {[x1, y1, x2, y2]} reaches {outside:g} pixels {where}"
        report.overshoots += 0 < outside <= BOX_TOLERANCE


def decoded_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of a picture, after decoding all of it. Raises ValueError as :func:`load_picture`."""
    if image_extension(data) is None:
        raise ValueError("its picture is not a JPEG, PNG or WebP file")
    try:
        return load_picture(data).size
    except ValueError as error:
        raise ValueError(f"its picture {error}") from None
