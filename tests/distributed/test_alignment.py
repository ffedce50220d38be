"""Alignment on two ranks gives the losses, the measure and the base of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.captions import caption_shards
from tests.helpers.fork_server import ForkServer
from tests.helpers.launch import records
from tests.helpers.tiny_causal import save_language, save_tower

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_align_as_one(stage: int, server: ForkServer, tmp_path: Path) -> None:
    save_language(tmp_path / "language")
    flags = ["--adapter", "projector", "--model", tmp_path / "language", "--vision", save_tower(tmp_path / "tower")]
    flags += ["--shards", caption_shards(tmp_path), "--logging_steps", 1]
    one, two = tmp_path / "one", tmp_path / "two"
    server.run(1, one, *flags, "--per_device_train_batch_size", 4)
    server.run(2, two, *flags, "--per_device_train_batch_size", 2, stage=stage)
    losses = [[record["loss"] for record in records(run, "train")] for run in (one, two)]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    first, second = (json.loads((run / "caption_loss.json").read_text())["dataset_tasks"] for run in (one, two))
    assert first["colours/caption"] == pytest.approx(second["colours/caption"], abs=1e-4)
    whole, parted = (load_file(run / "base/model.safetensors") for run in (one, two))
    assert whole.keys() == parted.keys()
    assert all(torch.allclose(whole[name], parted[name], atol=1e-3) for name in whole)
