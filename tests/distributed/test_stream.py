"""Two real processes on one stream: the same unit at every step, every sample once, a resume by another number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from lvlm_clorae.data.batches import Batcher
from lvlm_clorae.data.places import open_shards
from lvlm_clorae.data.plan import Order
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.stream import TrainingStream
from lvlm_clorae.data.units import find_units
from lvlm_clorae.models import Processor
from tests.data.server import serve
from tests.launch import REPOSITORY, small_shards

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

Rows = list[list[tuple[str, list[str], float]]]


def stream_of(place: str, rank: int, ranks: int, micro_batch: int, workers: int = 1) -> TrainingStream:
    index, sources = open_shards(place)
    processor = Processor.from_pretrained(REPOSITORY / "lvlm_clorae/models/demo")
    batcher = Batcher(ShardReader(index, sources), processor, "train")
    how = {"rank": rank, "world_size": ranks, "micro_batch": micro_batch, "workers": workers}
    return TrainingStream(batcher, find_units(index, "train"), Order(3, 8), **how)


def _rank(rank: int, place: str, folder: Path, steps: int) -> None:
    """Reads so many micro-steps, each followed by a collective as in training; rank 0 writes what all read."""
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    stream, rows = stream_of(place, rank, 2, 2), []
    for batch in stream:
        mine = batch.unit.name, batch.keys, float(batch.tensors["pixel_values"].double().sum())
        theirs: list[Any] = [None, None]
        distributed.all_gather_object(theirs, mine)
        rows.append(theirs)
        if len(rows) == steps:
            break
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps([rows, stream.state_dict()]))
    distributed.destroy_process_group()


def two_ranks(place: str, folder: Path, steps: int) -> tuple[Rows, dict[str, Any]]:
    folder.mkdir()
    multiprocessing.spawn(_rank, (place, folder, steps), nprocs=2)
    rows, state = json.loads((folder / "rows.json").read_text())
    return rows, state


def flat(rows: Rows) -> list[tuple[str, str]]:
    return [(unit, key) for step in rows for unit, keys, _ in step for key in keys]


def alone(place: str, micro_batch: int, state: dict[str, Any] | None = None) -> Rows:
    stream = stream_of(place, 0, 1, micro_batch, workers=0)
    if state:
        stream.load_state_dict(state)
    return [
        [
            (
                batch.unit.name,
                [key for key, ignored in zip(batch.keys, batch.ignored, strict=True) if not ignored],
                float(batch.tensors["pixel_values"].double().sum()),
            )
        ]
        for batch in stream
    ]


def test_two_processes_read_what_one_reads_and_one_goes_on(tmp_path: Path) -> None:
    directory = small_shards(tmp_path / "shards", train=22, dev=1, test=1)
    with serve(directory) as server:
        rows, _ = two_ranks(server.url, tmp_path / "whole", 10_000)
        some, state = two_ranks(str(directory), tmp_path / "some", 7)
    assert all(len({unit for unit, _, _ in step}) == 1 for step in rows), "all ranks train the same unit"
    whole = alone(str(directory), 4)
    assert flat(rows) == flat(whole)
    pictures = torch.tensor([sum(total for _, _, total in step) for step in rows])
    assert torch.allclose(pictures, torch.tensor([total for [(_, _, total)] in whole]), rtol=1e-6)
    assert len(rows) == 5 * 3 * 2, "five units, 22 samples in blocks of 8, two micro-steps a block"
    # Two ranks stopped within a block of 8; one rank with a micro-batch of 8 goes on.
    assert state["done"] == 28
    assert flat(some) + flat(alone(str(directory), 8, state)) == flat(whole)
