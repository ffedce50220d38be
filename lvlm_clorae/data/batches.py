"""Batches of one unit: samples read by the plan, prompts and answers made on the way, tensors from the processor."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lvlm_clorae.data.index import Index
from lvlm_clorae.data.plan import EpochPlan, Place, micro_steps
from lvlm_clorae.data.stream import ShardReader
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import build_prompt, format_answer

if TYPE_CHECKING:
    from lvlm_clorae.models.processor import Processor


@dataclass(frozen=True)
class Unit:
    """A dataset and sub-task, with what is needed to ask and to score it."""

    name: str
    dataset: str
    subtask: str
    task: str
    labels: Any
    reference_f1: float | None


def find_units(index: Index, split: str) -> dict[str, Unit]:
    """Every unit that has samples in ``split``, by name."""
    units = {}
    for name in index.units(split):
        dataset, subtask = name.split("/")
        entry = index.dataset(dataset)
        reference = entry.reference_f1.get(subtask)
        units[name] = Unit(name, dataset, subtask, entry.task, entry.labels[subtask], reference)
    return units


@dataclass(frozen=True)
class Batch:
    """Samples of one unit and the model's tensors for them; ``wrapped`` marks rows that only fill."""

    unit: Unit
    keys: list[str]
    samples: list[dict[str, Any]]
    wrapped: list[bool]
    tensors: dict[str, torch.Tensor]


def decode_picture(data: bytes, where: str) -> Image.Image:
    """The upright RGB picture of ``data``. Raises UserError, naming ``where``, for bytes that are no sound picture."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            with suppress(Exception):  # EXIF data that Pillow cannot write again, in a picture that is sound
                return ImageOps.exif_transpose(picture).convert("RGB")
            return picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        raise UserError(
            f"{where}: its picture cannot be decoded ({error}). Replace or remove it, then build again."
        ) from None


class Batcher:
    """Reads places of a split and makes batches of them."""

    def __init__(
        self, reader: ShardReader, processor: Processor, split: str, max_length: int = 256, max_answer_length: int = 128
    ) -> None:
        self.reader, self.processor, self.split = reader, processor, split
        self.limits = {"max_length": max_length, "max_answer_length": max_answer_length}

    def __call__(self, unit: Unit, places: list[Place], answers: bool = True) -> Batch:
        """The batch of ``unit`` at ``places``; with ``answers`` it holds ``labels``."""
        keys, samples, images = [], [], []
        for place in places:
            key, sample, picture = self.reader.read(unit.dataset, self.split, place)
            keys.append(key)
            samples.append(sample)
            shard = self.reader.shards(unit.dataset, self.split)[place.shard].name
            images.append(decode_picture(picture, f"{shard}, {key}") if picture is not None else None)
        tensors = self.processor(
            [build_prompt(sample, unit.subtask, unit.labels) for sample in samples],
            images,
            [[item["box"] for item in sample.get("objects") or ()] for sample in samples],
            [format_answer(sample, unit.subtask) for sample in samples] if answers else None,
            **self.limits,
        )
        return Batch(unit, keys, samples, [place.wrapped for place in places], tensors)


class _Stream(IterableDataset):
    """One rank's micro-steps. Worker w of W makes every W-th batch, so their order does not depend on W.

    A UserError is handed over like a batch, in its turn: a DataLoader would put a worker's traceback into its message.
    """

    def __init__(
        self,
        batcher: Batcher,
        units: dict[str, Unit],
        plan: EpochPlan,
        ranks: tuple[int, int],
        micro_batch: int,
        start: int,
    ) -> None:
        self.batcher, self.units, self.plan = batcher, units, plan
        self.ranks, self.micro_batch, self.start = ranks, micro_batch, start

    def __iter__(self) -> Iterator[Batch | UserError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for number, step in enumerate(micro_steps(self.plan, *self.ranks, self.micro_batch, self.start)):
            if number % workers == worker:
                try:
                    yield self.batcher(self.units[step.unit], step.places)
                except UserError as error:
                    yield error
                    return


def training_batches(
    batcher: Batcher,
    units: dict[str, Unit],
    plan: EpochPlan,
    *,
    rank: int,
    world_size: int,
    micro_batch: int,
    start: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """One rank's batches of an epoch from micro-step ``start`` on; all ranks get the same unit at the same time."""
    stream = _Stream(batcher, units, plan, (rank, world_size), micro_batch, start)
    # Its own generator: drawing a seed for workers must not move the random state that dropout goes on from.
    for batch in DataLoader(stream, batch_size=None, num_workers=workers, generator=torch.Generator()):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def evaluation_batches(batcher: Batcher, unit: Unit, *, rank: int, world_size: int, batch_size: int) -> Iterator[Batch]:
    """One rank's share of a split, each sample on exactly one rank.

    Every rank gets the same number of batches, because under ZeRO-3 all must generate together: where a rank has
    nothing left its rows are ``wrapped`` copies, not to be counted.
    """
    shards = batcher.reader.shards(unit.dataset, batcher.split)
    places = [Place(number, sample, False) for number, shard in enumerate(shards) for sample in range(shard.samples)]
    wide = world_size * batch_size
    for start in range(0, len(places), wide):
        mine = places[start : start + wide][rank::world_size]
        yield batcher(unit, mine or [Place(0, 0, True)], answers=False)
