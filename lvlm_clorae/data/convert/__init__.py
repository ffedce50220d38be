"""Raw datasets to shards: ``build("twitter15", input_dir, images_dir, output_dir)``.

A converter has a `SPEC` (`DatasetSpec`) and ``convert(input_dir, images, report)``, a generator of (split, key, sample,
picture bytes or None). It rejects a record that it cannot read through `report` and goes on. Each published dataset is
a module of its name; `jsonl` makes one of a folder of the user's own.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, cast

from lvlm_clorae.data.convert.common import BuildReport, Converter, Rejection
from lvlm_clorae.data.convert.jsonl import JsonLines
from lvlm_clorae.data.convert.voc import VocBoxes
from lvlm_clorae.data.shards import DatasetSpec, ShardWriter
from lvlm_clorae.data.verify import unknown_labels
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.tasks.schema import check_sample, missing_annotations

__all__ = ["CONVERTERS", "BuildReport", "Rejection", "TooManyRejected", "build", "load_converter"]

PUBLISHED = ("twitter15", "twitter17", "snap", "mre_v1", "mre_v2", "ace2005", "swig", "m2e2")
"""The published datasets; each has a module of its name here."""
OWN = "jsonl"
"""What a dataset of the user's own is called until it is read."""
CONVERTERS = (*PUBLISHED, OWN)


class TooManyRejected(UserError):
    """More records than allowed could not be converted; no shard was written. `report` lists them."""

    exit_code = 1

    def __init__(self, message: str, report: BuildReport) -> None:
        super().__init__(message)
        self.report = report


def load_converter(dataset: str, input_dir: Path, name: str | None = None) -> Converter:
    """The converter of that name; for `jsonl` it is made from `input_dir`, and the dataset is called `name`.

    Raises UserError, with the nearest name, where there is none, for a `name` of any other, and as `JsonLines`.
    """
    if dataset == OWN:
        return JsonLines(input_dir, name)
    if dataset not in PUBLISHED:
        raise UserError(f'There is no converter for "{dataset}".{nearest(dataset, CONVERTERS)}')
    if name is not None:
        raise UserError(f"A name is for datasets of your own (--dataset {OWN}); {dataset} has one. Leave --name out.")
    return cast(Converter, importlib.import_module(f"{__name__}.{dataset}"))


def build(
    dataset: str,
    input_dir: Path,
    images_dir: Path | None,
    output_dir: Path,
    *,
    name: str | None = None,
    boxes_dir: Path | None = None,
    limit: int | None = None,
    max_rejected: float = 0.005,
    max_samples: int = 500,
    max_bytes: int = 256 << 20,
) -> BuildReport:
    """Convert a dataset, in its publisher's own files, and add it to the shards of `output_dir`.

    `name` is what a dataset of the user's own (`jsonl`) is called, `boxes_dir` has Pascal VOC boxes for the pictures of
    an entity dataset. `limit` is the most samples a split gets, `max_rejected` the largest fraction of records that may
    be rejected, `max_samples` and `max_bytes` bound a shard. Rejected records are written to
    ``rejected-<dataset's name>.jsonl`` in `output_dir`. A sample whose picture is missing is kept.

    Raises UserError for an unknown dataset, a missing input file (saying where it is published), boxes for a dataset
    of another task and an output that already has the dataset; TooManyRejected, after writing the rejected records,
    with no shard written.
    """
    if limit is not None and limit < 1:
        raise UserError(f"The limit is {limit}, but a split needs at least one sample.")
    if not 0 <= max_rejected <= 1:
        raise UserError(f"The share of records that may be rejected is {max_rejected}, but must be from 0 to 1.")
    converter = load_converter(dataset, input_dir, name)
    boxes = VocBoxes(boxes_dir) if boxes_dir else None
    if boxes and converter.SPEC.task != "mner":
        raise UserError(
            f"Boxes belong to the entities of mner datasets, but {dataset} has other tasks. Leave --boxes out."
        )
    report = BuildReport(converter.SPEC.name, limit)
    with ShardWriter(output_dir, converter.SPEC, max_samples=max_samples, max_bytes=max_bytes) as writer:
        for split, key, sample, image in converter.convert(input_dir, images_dir, report):
            try:
                if boxes:
                    boxes.attach(sample, report)
                _check(sample, converter.SPEC)
                writer.add(split, key, sample, image)
            except UserError as error:
                report.reject(sample["source"], str(error), sample)
                continue
            report.samples[split] += 1
            report.pictures += image is not None
            report.missing_pictures += image is None and sample.get("image") is not None
        _write_rejected(report, output_dir)
        _check_fraction(report, max_rejected)
    return report


def _check(sample: dict[str, Any], spec: DatasetSpec) -> None:
    faults = check_sample(sample)
    if not faults:
        faults = [
            f"{key}: is missing, which the sub-tasks {', '.join(spec.subtasks)} ask for"
            for key in missing_annotations(sample, spec.subtasks)
        ]
    if not faults:
        faults = [f"unknown label: {label}" for label in unknown_labels(sample, spec.labels)]
    if faults:
        raise UserError("; ".join(faults[:3]))


def _write_rejected(report: BuildReport, output_dir: Path) -> None:
    path = output_dir / f"rejected-{report.dataset}.jsonl"
    if report.rejected:
        lines = [json.dumps(vars(item)) for item in report.rejected]  # ASCII: lone surrogates are one cause
        write_text_atomic(path, "\n".join(lines) + "\n")
        report.rejected_file = path
    else:
        path.unlink(missing_ok=True)  # that of an earlier attempt


def _check_fraction(report: BuildReport, max_rejected: float) -> None:
    rejected, total = len(report.rejected), len(report.rejected) + report.samples.total()
    if rejected > max_rejected * total:
        first = report.rejected[0]
        raise TooManyRejected(
            f"{report.dataset}: {rejected} of {total} records could not be converted, more than the "
            f"{100 * max_rejected:g} % allowed, so no shards were written. First: {first.file}, line {first.line}: "
            f"{first.reason}. All are in {report.rejected_file}; --max-rejected raises the limit.",
            report,
        )
