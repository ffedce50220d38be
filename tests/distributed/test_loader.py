"""Two real processes on one epoch: the same dataset task at every step, every sample once, a resume on one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.loader import ShardDataLoader
from lvlm_clorae.data.sampler import DistributedTaskBatchSampler, SamplingPlan
from lvlm_clorae.data.storage import open_storages
from lvlm_clorae.models import Processor
from tests.helpers.launch import REPOSITORY, small_shards
from tests.helpers.server import serve

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

Rows = list[list[tuple[str, list[str], float]]]


def make_loader(
    shards: str, rank: int, ranks: int, batch_size: int, workers: int = 1
) -> tuple[DistributedTaskBatchSampler, ShardDataLoader]:
    dataset = ShardDataset(*open_storages(shards))
    processor = Processor.from_pretrained(REPOSITORY / "lvlm_clorae/models/demo")
    dataset_tasks = dataset.index.dataset_tasks("train")
    sampler = DistributedTaskBatchSampler(
        dataset, dataset_tasks, SamplingPlan(3, 8), rank=rank, world_size=ranks, batch_size=batch_size
    )
    return sampler, ShardDataLoader(dataset, sampler, Collator(processor, dataset_tasks), workers)


def _rank(rank: int, shards: str, folder: Path, steps: int) -> None:
    """Read a number of micro-steps, each followed by a collective as in training; rank 0 writes what all read."""
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    (sampler, loader), rows = make_loader(shards, rank, 2, 2), []
    for batch in loader:
        mine = batch.dataset_task.name, batch.keys, float(batch.tensors["pixel_values"].double().sum())
        theirs: list[Any] = [None, None]
        distributed.all_gather_object(theirs, mine)
        rows.append(theirs)
        if len(rows) == steps:
            break
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps([rows, sampler.state_dict()]))
    distributed.destroy_process_group()


def two_ranks(shards: str, folder: Path, steps: int) -> tuple[Rows, dict[str, Any]]:
    folder.mkdir()
    multiprocessing.spawn(_rank, (shards, folder, steps), nprocs=2)
    rows, state = json.loads((folder / "rows.json").read_text())
    return rows, state


def flat(rows: Rows) -> list[tuple[str, str]]:
    return [(dataset_task, key) for step in rows for dataset_task, keys, _ in step for key in keys]


def alone(shards: str, batch_size: int, state: dict[str, Any] | None = None) -> Rows:
    sampler, loader = make_loader(shards, 0, 1, batch_size, workers=0)
    if state:
        sampler.load_state_dict(state)
    return [
        [
            (
                batch.dataset_task.name,
                [key for key, ignored in zip(batch.keys, batch.ignored, strict=True) if not ignored],
                float(batch.tensors["pixel_values"].double().sum()),
            )
        ]
        for batch in loader
    ]


def test_two_processes_read_the_samples_of_one_and_one_resumes(tmp_path: Path) -> None:
    directory = small_shards(tmp_path / "shards", train=22, dev=1, test=1)
    with serve(directory) as server:
        rows, _ = two_ranks(server.url, tmp_path / "whole", 10_000)
        some, state = two_ranks(str(directory), tmp_path / "some", 7)
    assert all(len({dataset_task for dataset_task, _, _ in step}) == 1 for step in rows), (
        "all ranks train the same dataset task"
    )
    whole = alone(str(directory), 4)
    assert flat(rows) == flat(whole)
    images = torch.tensor([sum(total for _, _, total in step) for step in rows])
    assert torch.allclose(images, torch.tensor([total for [(_, _, total)] in whole]), rtol=1e-6)
    assert len(rows) == 5 * 3 * 2, "five dataset tasks, 22 samples in global micro-batches of 8, two micro-steps each"
    # Two ranks stopped within a global micro-batch of 8; one rank with a batch size of 8 resumes.
    assert state["consumed_samples"] == 28
    assert flat(some) + flat(alone(str(directory), 8, state)) == flat(whole)
