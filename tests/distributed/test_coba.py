"""CoBa's weights on one and two ranks, under ZeRO-3, and in a run that is stopped and resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.fork_server import ForkServer, wait_for_records
from tests.helpers.launch import REPOSITORY, records, small_shards

COBA = ["--coba_update_interval", 2, "--coba_warmup_steps", 4, "--coba_history_length", 3]
SETTINGS = ["--logging_steps", 1, "--max_steps", 12, "--save_steps", 3, "--max_target_length", 16, "--lora_dropout", 0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("coba") / "shards", train=16)


def arguments(directory: Path, shards: Path, ranks: int, stage: int = 2) -> list[object]:
    files = ["--deepspeed", REPOSITORY / f"ds_configs/zero{stage}.json", "--output_dir", directory, "--shards", shards]
    batch = ["--per_device_train_batch_size", 4 // ranks, "--resume_from_checkpoint", "auto"]
    return [*files, *batch, *SETTINGS, "--loss_weighting", "coba", *COBA]


def run(server: ForkServer, directory: Path, shards: Path, ranks: int, stage: int = 2) -> None:
    log = directory.with_name(f"{directory.name}.log")
    pids = server.start(ranks, log, *arguments(directory, shards, ranks, stage))
    assert [server.wait(pid) for pid in pids] == [0] * ranks, log.read_text()


@pytest.fixture(scope="module")
def whole(server: ForkServer, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks without interruption."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    run(server, directory, shards, 2)
    return directory


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 3)])
def test_weights_do_not_depend_on_ranks_and_stage_and_weigh_the_loss(
    ranks: int, stage: int, whole: Path, server: ForkServer, shards: Path, tmp_path: Path
) -> None:
    run(server, tmp_path / "run", shards, ranks, stage)
    found, expected = records(tmp_path / "run", "coba"), records(whole, "coba")
    assert [record["step"] for record in found] == [0, 2, 4, 6, 8, 10]
    for mine, other in zip(found, expected, strict=True):
        assert mine["dev_loss"] == pytest.approx(other["dev_loss"], rel=1e-3)
        assert mine["weights"] == pytest.approx(other["weights"], abs=0.02)  # slopes amplify rounding
    equal = [set(record["weights"].values()) == {1.0} for record in found]
    assert equal == [True, True, False, False, False, False], "warm-up"
    weights: dict[str, float] = {}
    by_step = {record["step"]: record["weights"] for record in found}
    for record in records(tmp_path / "run", "train"):
        weights = by_step.get(record["step"] - 1, weights)
        weighted = weights[record["dataset_task"]] * record["ce"] + 0.01 * record["mim"]
        assert record["loss"] == pytest.approx(weighted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_resumed_run_equals_an_uninterrupted_one(
    whole: Path, server: ForkServer, shards: Path, tmp_path: Path
) -> None:
    directory, log = tmp_path / "run", tmp_path / "log"
    for count in (6, 14):  # records, before and after the end of the warm-up
        pids = server.start(2, log, *arguments(directory, shards, 2))
        wait_for_records(directory, count, log)
        os.kill(pids[1], signal.SIGUSR1)
        assert {server.wait(pid) for pid in pids} <= {75}, log.read_text()
    run(server, directory, shards, 2)
    for kind in ("coba", "train", "dev"):
        assert records(directory, kind) == records(whole, kind)
    adapter = "adapter/adapter_model.safetensors"
    assert (directory / adapter).read_bytes() == (whole / adapter).read_bytes()
