"""Raw datasets to shards: ``build("twitter15", input_dir, images_dir, output_dir)``.

A converter is a module with a `SPEC` (`DatasetSpec`) and ``convert(input_dir, images, report)``, a generator of
(split, key, sample, picture bytes or None). It rejects a record that it cannot read through `report` and goes on.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, cast

from lvlm_clorae.data.convert.common import BuildReport, Converter, Rejection
from lvlm_clorae.data.shards import DatasetSpec, ShardWriter
from lvlm_clorae.data.verify import unknown_labels
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.tasks.schema import check_sample

__all__ = ["CONVERTERS", "BuildReport", "Rejection", "TooManyRejected", "build", "load_converter"]

CONVERTERS = {"twitter15": "twitter", "mre_v1": "mnre", "m2e2": "m2e2"}
"""Dataset name -> module of this package."""


class TooManyRejected(UserError):
    """More records than allowed could not be converted; no shard was written. `report` lists them."""

    exit_code = 1

    def __init__(self, message: str, report: BuildReport) -> None:
        super().__init__(message)
        self.report = report


def load_converter(dataset: str) -> Converter:
    """The converter of that name. Raises UserError, with the nearest name, where there is none."""
    if dataset not in CONVERTERS:
        raise UserError(f'There is no converter for "{dataset}".{nearest(dataset, CONVERTERS)}')
    return cast(Converter, importlib.import_module(f"{__name__}.{CONVERTERS[dataset]}"))


def build(
    dataset: str,
    input_dir: Path,
    images_dir: Path | None,
    output_dir: Path,
    *,
    limit: int | None = None,
    max_rejected: float = 0.005,
    max_samples: int = 500,
    max_bytes: int = 256 << 20,
) -> BuildReport:
    """Convert a dataset, in its publisher's own files, and add it to the shards of `output_dir`.

    `limit` is the most samples a split gets, `max_rejected` the largest fraction of records that may be rejected,
    `max_samples` and `max_bytes` bound a shard. Rejected records are written to ``rejected-<dataset>.jsonl`` in
    `output_dir`. A sample whose picture is missing is kept.

    Raises UserError for an unknown dataset, a missing input file (saying where it is published) and an output that
    already has the dataset; TooManyRejected, after writing the rejected records, with no shard written.
    """
    if limit is not None and limit < 1:
        raise UserError(f"The limit is {limit}, but a split needs at least one sample.")
    converter = load_converter(dataset)
    report = BuildReport(dataset, limit)
    with ShardWriter(output_dir, converter.SPEC, max_samples=max_samples, max_bytes=max_bytes) as writer:
        for split, key, sample, image in converter.convert(input_dir, images_dir, report):
            try:
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
        faults = [f"unknown label: {label}" for label in unknown_labels(sample, spec.labels)]
    if faults:
        raise UserError("; ".join(faults[:3]))


def _write_rejected(report: BuildReport, output_dir: Path) -> None:
    path = output_dir / f"rejected-{report.dataset}.jsonl"
    if report.rejected:
        lines = [json.dumps(vars(item)) for item in report.rejected]  # ASCII: lone surrogates are one cause
        write_text_atomic(path, "\n".join(lines) + "\n")
        report.rejected_file = path


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
