"""Validation of shards: reads everything and lists all problems, with shard and key."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lvlm_clorae.data.images import InvalidImage, load_image
from lvlm_clorae.data.index import DatasetEntry, DatasetSpec, ShardEntry, content_fault, file_fault, load_index
from lvlm_clorae.data.reader import MAX_END_BYTES, RawSample, decode_sample, read_raw_samples
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks.schema import box_problem, missing_annotations, unknown_labels


class Problem(NamedTuple):
    """A problem of a sample, or of the shard itself (`key` is None)."""

    shard: str
    key: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.shard}, {self.key}: {self.message}" if self.key else f"{self.shard}: {self.message}"


@dataclass
class Report:
    """Counts and problems of the shards."""

    shards: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    images: int = 0
    missing_images: int = 0
    boxes: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def add(self, shard: str, key: str | None, message: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(shard, key, message))


def verify(directory: Path) -> Report:
    """Read every shard of the index and compare it with the index and the format.

    A shard must have the indexed size, SHA-256, number and offsets of samples; a sample valid JSON (`check_sample`),
    the name, task and labels of its dataset, a key that is unique in its split, an image that `load_image` loads, and
    boxes inside the upright image up to `BOX_TOLERANCE`. A .tar file that is not in the index is a problem too. Raises
    UserError only without an index (see `load_index`).
    """
    report, indexed = Report(), set()
    for dataset in load_index(directory, check_files=False).datasets.values():
        for split, shards in dataset.splits.items():
            keys: set[str] = set()
            for shard in shards:
                _verify_shard(directory, dataset, split, shard, keys, report)
            indexed |= {shard.name for shard in shards}
            report.shards += len(shards)
    for name in sorted({path.name for path in directory.glob("*.tar")} - indexed):
        report.add(name, None, "is not in the index; remove it if an interrupted build left it")
    return report


def misfits(sample: Mapping[str, Any], spec: DatasetSpec, size: tuple[int, int] | None) -> Iterator[str]:
    """Yield why a valid sample does not fit its dataset or image: name, task, annotations, labels, boxes.

    ``size`` is that of the upright image, None without one.
    """
    for name, value in (("dataset", spec.name), ("task", spec.task)):
        if sample[name] != value:
            yield f'{name} is "{sample[name]}", but the dataset\'s is "{value}"'
    if missing := missing_annotations(sample, spec.subtasks):
        yield f"has no {' and '.join(missing)}, which the sub-tasks {', '.join(spec.subtasks)} need"
    for label in unknown_labels(sample, spec.labels):
        yield f"unknown label: {label}"
    for item in sample.get("objects", ()) if size else ():
        if problem := box_problem(item["box"], size):
            yield f"{item['id']} {problem}; was it resized, or annotated before it was turned upright?"


def _verify_shard(
    directory: Path, dataset: DatasetEntry, split: str, shard: ShardEntry, keys: set[str], report: Report
) -> None:
    if problem := file_fault(directory, shard):
        report.add(shard.name, None, problem)
    if not (directory / shard.name).is_file():
        return
    if problem := content_fault(directory, shard):
        report.add(shard.name, None, problem)
    offsets, images = [], report.images
    try:
        with open(directory / shard.name, "rb") as handle:
            for record in read_raw_samples(handle, shard.name):
                offsets.append(record.offset)
                for message in _record_problems(record, dataset, report):
                    report.add(shard.name, record.key, message)
                if record.key in keys:
                    report.add(shard.name, record.key, "the key occurs twice in its split")
                keys.add(record.key)
            end = handle.read(MAX_END_BYTES + 1)
            if end.strip(b"\0") or len(end) > MAX_END_BYTES:
                report.add(shard.name, None, "has other bytes after the block that ends a tar file")
    except OSError as error:
        report.add(shard.name, None, f"cannot be read ({error.strerror})")
    except UserError as error:
        report.add(shard.name, None, str(error).removeprefix(f"{shard.name}: ").removeprefix(f"{shard.name}, "))
    report.samples[f"{dataset.name}/{split}"] += len(offsets)
    if len(offsets) != shard.samples:
        report.add(shard.name, None, f"has {len(offsets)} samples, but the index has {shard.samples}")
    elif offsets != list(shard.offsets):
        report.add(shard.name, None, "sample offsets differ from the index")
    elif shard.images not in (None, report.images - images):
        report.add(shard.name, None, f"has {report.images - images} images, but the index has {shard.images}")


def _record_problems(record: RawSample, dataset: DatasetEntry, report: Report) -> Iterator[str]:
    try:
        sample = decode_sample(record.json, "JSON")
    except UserError as error:
        yield str(error)
        return
    size = None
    report.boxes += len(sample.get("objects", ()))
    report.images += record.image is not None
    report.missing_images += record.image is None and sample.get("image") is not None
    if record.image is not None and sample.get("image") is None:
        yield 'has an image, but its "image" is null'
    try:
        size = load_image(record.image, "its image").size if record.image is not None else None
    except InvalidImage as error:
        yield str(error)
    yield from misfits(sample, dataset, size)
