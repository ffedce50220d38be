"""The end of a run inside an epoch, a run that is done, and a return to an earlier checkpoint; on one and two ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.launch import records, small_shards

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SETTINGS = ["--num_train_epochs", 3, "--max_steps", 6, "--save_steps", 2, "--save_total_limit", 9, "--logging_steps", 1]
SETTINGS += ["--max_target_length", 8, "--lora_rank", 4]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("end") / "shards", train=8, dev=2, test=2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_ends_inside_an_epoch(ranks: int, server: ForkServer, shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    line = [ranks, directory, "--shards", shards, *SETTINGS, "--per_device_train_batch_size", 4 // ranks]
    server.run(*line)  # type: ignore[arg-type]
    (dev,) = records(directory, "dev")
    assert (dev["step"], dev["epoch"]) == (6, 0.6)
    weights = (directory / "adapter" / WEIGHTS).read_bytes()
    assert (directory / "best" / WEIGHTS).read_bytes() == weights, "the only evaluation is that of the last step"

    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    log = server.run(*line, "--resume_from_checkpoint", "auto")  # type: ignore[arg-type]
    assert "scores.json" in log
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before

    trained = records(directory, "train")
    earlier = ["--resume_from_checkpoint", directory / "checkpoints/step-00000004"]
    refused = server.run(*line, *earlier, code=2)  # type: ignore[arg-type]
    subprocess.run(f"mkdir {refused.rpartition(': mkdir ')[2]}", shell=True, check=True)
    log = server.run(*line, *earlier)  # type: ignore[arg-type]
    assert "step 4" in log
    assert records(directory, "train") == trained
    assert records(directory, "dev") == [dev]
    for folder in ("adapter", "best"):
        assert (directory / folder / WEIGHTS).read_bytes() == weights
    assert (directory / "after-step-00000004/best" / WEIGHTS).read_bytes() == weights
