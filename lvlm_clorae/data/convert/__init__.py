"""Conversion of datasets to shards: ``build("twitter15", input_dir, images_dir, output_dir)``.

A `Converter` has the dataset's `spec`, and a function that yields (split, key, sample, image bytes or None) and rejects
records that it cannot read. Each published dataset has one; `jsonl` and `captions` make one for a directory of the
user's own.
"""

import json
from pathlib import Path

from lvlm_clorae.data.convert import captions, conll, events, funsd, m2e2, mnre, sroie, swig
from lvlm_clorae.data.convert.common import BuildReport, Converter, Rejection
from lvlm_clorae.data.convert.jsonl import folder_converter
from lvlm_clorae.data.convert.voc import VocBoxes
from lvlm_clorae.data.images import image_size
from lvlm_clorae.data.validation import misfits
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.tasks.schema import ANNOTATIONS, check_sample

__all__ = ["CONVERTERS", "BuildReport", "Converter", "Rejection", "TooManyRejected", "build", "load_converter"]

_PUBLISHED: dict[str, Converter] = {
    **conll.CONVERTERS,
    **mnre.CONVERTERS,
    "ace2005": events.CONVERTER,
    "swig": swig.CONVERTER,
    "m2e2": m2e2.CONVERTER,
    "sroie": sroie.CONVERTER,
    "funsd": funsd.CONVERTER,
}
PUBLISHED = tuple(_PUBLISHED)
OWN = {"jsonl": folder_converter, "captions": captions.folder_converter}  # the converters of the user's own datasets
CONVERTERS = (*PUBLISHED, *OWN)


class TooManyRejected(UserError):
    """Raised if more records than allowed could not be converted; no shard is written. `report` lists them."""

    exit_code = 1

    def __init__(self, message: str, report: BuildReport) -> None:
        super().__init__(message)
        self.report = report


def load_converter(dataset: str, input_dir: Path, name: str | None = None) -> Converter:
    """Return the converter of a dataset; those of `OWN` are made from `input_dir`, and name the dataset `name`.

    Raises UserError for an unknown dataset, a `name` of a published one, and as those of `OWN` do.
    """
    if dataset in OWN:
        return OWN[dataset](input_dir, name)
    if dataset not in _PUBLISHED:
        raise UserError(f'There is no converter for "{dataset}".{nearest(dataset, CONVERTERS)}')
    if name is not None:
        raise UserError(
            f"--name is only for datasets of your own (--dataset {' or '.join(OWN)}). Omit it for {dataset}."
        )
    return _PUBLISHED[dataset]


def build(
    dataset: str,
    input_dir: Path,
    images_dir: Path | None,
    output_dir: Path,
    *,
    name: str | None = None,
    boxes_dir: Path | None = None,
    layout: bool = True,
    limit: int | None = None,
    max_rejected: float = 0.005,
) -> BuildReport:
    """Convert a dataset in its published files, and add it to the shards of a directory.

    Args:
        dataset: one of `CONVERTERS`
        input_dir: the annotation files
        images_dir: the images; a sample whose image is missing is kept
        output_dir: the shards; rejected records are written to ``rejected-<name>.jsonl`` in it
        name: the name of a dataset of the user's own
        boxes_dir: Pascal VOC boxes for the images of an entity dataset
        layout: keep the boxes of the text, which prompts then contain
        limit: maximum number of samples per split
        max_rejected: maximum fraction of rejected records

    Raises:
        UserError: for an unknown dataset, a missing input file (with its place of publication), boxes for a dataset of
            another task, and an output that has the dataset already
        TooManyRejected: after writing the rejected records, without writing a shard
    """
    if limit is not None and limit < 1:
        raise UserError(f"The limit is {limit}, but a split needs at least one sample.")
    if not 0 <= max_rejected <= 1:
        raise UserError(f"The maximum fraction of rejected records is {max_rejected}, but must be from 0 to 1.")
    converter = load_converter(dataset, input_dir, name)
    spec = converter.spec
    boxes = VocBoxes(boxes_dir) if boxes_dir else None
    if boxes and spec.task != "mner":
        raise UserError(f"--boxes is only for datasets of task mner, but {dataset} has task {spec.task}. Omit it.")
    report = BuildReport(spec.name, limit)
    with ShardWriter(output_dir, spec) as writer:
        for split, key, sample, image in converter.convert(input_dir, images_dir, report):
            try:
                if not layout:
                    sample.pop("layout", None)
                if boxes:
                    boxes.attach(sample, report)
                size = image_size(image) if image else None
                if problems := check_sample(sample) or list(misfits(sample, spec, size)):
                    raise UserError("; ".join(problems[:3]))
                writer.add(split, key, sample, image)
            except UserError as error:
                report.reject(sample["source"], str(error), sample)
                continue
            report.samples[split] += 1
            for key in sorted(set(ANNOTATIONS.values()) & set(sample) - {ANNOTATIONS[name] for name in spec.subtasks}):
                report.notes[f'records with "{key}", which no sub-task of the dataset uses'] += 1
            report.count_image(sample.get("image"), image)
        _check_rejected(report, output_dir, max_rejected)
    return report


def _check_rejected(report: BuildReport, output_dir: Path, max_rejected: float) -> None:
    """Write the rejected records. Raises TooManyRejected if their fraction exceeds `max_rejected`."""
    path = output_dir / f"rejected-{report.dataset}.jsonl"
    if not report.rejected:
        path.unlink(missing_ok=True)  # the list of an earlier build
        return
    lines = [json.dumps(vars(item)) for item in report.rejected]  # ASCII, because a record can have lone surrogates
    write_text_atomic(path, "\n".join(lines) + "\n")
    report.rejected_file = path
    rejected, total = len(report.rejected), len(report.rejected) + report.samples.total()
    if rejected > max_rejected * total:
        first = report.rejected[0]
        raise TooManyRejected(
            f"{report.dataset}: {rejected} of {total} records could not be converted, more than the "
            f"{100 * max_rejected:g} % allowed, so no shards were written. First: {first.file}, line {first.line}: "
            f"{first.reason}. All are in {report.rejected_file}. Fix them, or raise --max_rejected.",
            report,
        )
