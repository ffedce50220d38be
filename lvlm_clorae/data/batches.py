"""Batches: samples read by the plan, prompts and answers made on the way, tensors from the processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from numpy.typing import NDArray

from lvlm_clorae.data.pictures import decode_picture
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.reader import BadSample
from lvlm_clorae.data.shard_reader import RawSample, ShardReader
from lvlm_clorae.data.units import Unit
from lvlm_clorae.tasks import build_prompt, format_answer
from lvlm_clorae.tasks.schema import missing_annotations

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_clorae.models.processor import Processor


SHARED_BYTES = 1 << 16


class Instance(NamedTuple):
    """A sample's place, and the unit for which it is asked there."""

    unit: Unit
    place: Place


@dataclass(frozen=True)
class Batch:
    """Samples, in training all of one unit, and the model's tensors for them."""

    units: list[Unit]
    """Of each row."""
    keys: list[str]
    samples: list[dict[str, Any]]
    prompts: list[str]
    wrapped: list[bool]
    """Rows that only fill the batch, and are trained on or counted elsewhere."""
    ignored: list[bool]
    """Rows of which nothing is learnt or counted: no answer stands in ``labels``."""
    tensors: dict[str, torch.Tensor]
    bad: list[str] = field(default_factory=list)
    """What was wrong with samples that were skipped, or whose picture was left out."""

    def __getstate__(self) -> dict[str, Any]:
        """From a worker to its parent, a tensor costs a file of shared memory: worth it for large ones alone."""
        tensors = {name: _as_array(tensor) for name, tensor in self.tensors.items()}
        return {**vars(self), "tensors": tensors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: torch.as_tensor(value) for name, value in state["tensors"].items()}
        vars(self).update(state, tensors=tensors)

    @property
    def unit(self) -> Unit:
        """The one unit of all rows, in training."""
        first, *others = self.units
        if any(unit.name != first.name for unit in others):
            raise ValueError(f"the rows are of several units: {sorted({unit.name for unit in self.units})}")
        return first

    @property
    def counted(self) -> list[bool]:
        """Rows whose answers are scored in evaluation."""
        return [not (wrapped or ignored) for wrapped, ignored in zip(self.wrapped, self.ignored, strict=True)]


def _as_array(tensor: torch.Tensor) -> torch.Tensor | NDArray[Any]:
    return tensor.numpy() if tensor.nbytes < SHARED_BYTES else tensor


@dataclass(frozen=True)
class _Row:
    """What the processor is told of one sample."""

    key: str
    sample: dict[str, Any]
    prompt: str = ""
    answer: str = ""
    picture: Image.Image | None = None
    boxes: Sequence[Sequence[float]] = ()
    skipped: bool = False


class Batcher:
    """Reads places of a split and makes batches of them.

    Args:
        reader, processor, split: from where, by what, of which samples
        max_length, max_answer_length: tokens of a prompt and of an answer
        on_bad_sample: what becomes of a sample that is not sound. ``error``: BadSample is raised. ``blank``: a picture
            that cannot be decoded counts as missing. ``skip``: the row stays, so that all ranks' batches remain alike,
            and is ignored; so it is under ``blank`` where it is not the picture that is bad.
        pictures: False: every picture counts as missing
    """

    def __init__(
        self,
        reader: ShardReader,
        processor: Processor,
        split: str,
        max_length: int = 256,
        max_answer_length: int = 128,
        on_bad_sample: str = "error",
        pictures: bool = True,
    ) -> None:
        self.reader, self.processor, self.split, self.on_bad_sample = reader, processor, split, on_bad_sample
        self.pictures = pictures
        self.limits = {"max_length": max_length, "max_answer_length": max_answer_length}

    def __call__(self, instances: Sequence[Instance], answers: bool = True) -> Batch:
        """The batch of ``instances``, a row each; with ``answers`` it holds ``labels``.

        Raises:
            BadSample: as the policy has it.
            UserError: a shard cannot be read.
        """
        bad: list[str] = []
        units, places = [unit for unit, _ in instances], [place for _, place in instances]
        rows = [self._row(unit, raw, bad) for unit, raw in zip(units, self._read(instances), strict=True)]
        tensors = self.processor(
            [row.prompt for row in rows],
            [row.picture for row in rows],
            [row.boxes for row in rows],
            [row.answer for row in rows] if answers else None,
            **self.limits,
        )
        ignored = [row.skipped or place.done for row, place in zip(rows, places, strict=True)]
        if answers and any(ignored):
            tensors["labels"][torch.tensor(ignored)] = -100
        return Batch(
            units,
            [row.key for row in rows],
            [row.sample for row in rows],
            [row.prompt for row in rows],
            [place.wrapped for place in places],
            ignored,
            tensors,
            bad,
        )

    def _read(self, instances: Sequence[Instance]) -> Iterator[RawSample | BadSample]:
        for dataset, run in groupby(instances, lambda instance: instance.unit.dataset):
            yield from self.reader.read_all(dataset, self.split, [place for _, place in run])

    def _row(self, unit: Unit, raw: RawSample | BadSample, bad: list[str]) -> _Row:
        if isinstance(raw, BadSample):
            return self._skipped(raw, bad)
        where = f"{raw.shard}, {raw.key}"
        missing = missing_annotations(raw.sample, [unit.subtask])
        if missing:
            return self._skipped(BadSample(f"{where}: has no {missing[0]}, which {unit.name} asks for."), bad)
        picture = None
        if self.pictures and raw.picture is not None:
            try:
                picture = decode_picture(raw.picture, where)
            except BadSample as error:
                if self.on_bad_sample != "blank":
                    return self._skipped(error, bad)
                bad.append(str(error))
        return _Row(
            raw.key,
            raw.sample,
            build_prompt(raw.sample, unit.subtask, unit.labels),
            format_answer(raw.sample, unit.subtask),
            picture,
            [item["box"] for item in raw.sample.get("objects") or ()],
        )

    def _skipped(self, error: BadSample, bad: list[str]) -> _Row:
        if self.on_bad_sample == "error":
            raise error
        bad.append(str(error))
        return _Row("", {}, skipped=True)
