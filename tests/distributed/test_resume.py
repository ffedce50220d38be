"""A run resumes on another number of ranks and under another ZeRO stage."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.helpers.fork_server import ForkServer, wait_for_records
from tests.helpers.launch import REPOSITORY, records, small_shards

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
STEPS = 20
SETTINGS = [
    "--lora_dropout",
    0,
    "--learning-rate",
    1e-3,
    "--max-steps",
    STEPS,
    "--num_train_epochs",
    2,
    "--logging_steps",
    1,
]
# Ranks and ZeRO stage of the consecutive parts of one run.
LAYOUTS = [(2, 2), (1, 3), (2, 3), (1, 1), (2, 2)]


class Runs:
    """Runs of one base on the same shards."""

    def __init__(self, server: ForkServer, base: Path, folder: Path) -> None:
        self.server, self.base, self.log = server, base, folder / "log"
        self.shards = small_shards(folder / "shards", train=24, dev=0, test=0)

    def start(self, directory: Path, ranks: int, stage: int, *more: object) -> list[int]:
        files = ["--deepspeed", REPOSITORY / f"ds_configs/zero{stage}.json", "--output_dir", directory]
        if stage == 1:
            (directory.parent / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
            files[1] = directory.parent / "zero1.json"
        data = ["--shards", self.shards, "--model", self.base, "--resume_from_checkpoint", "auto"]
        return self.server.start(ranks, self.log, *files, *data, *SETTINGS, *more)

    def ends(self, pids: list[int]) -> list[int]:
        return [self.server.wait(pid) for pid in pids]


@pytest.fixture(scope="module")
def runs(server: ForkServer, random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(server, random_base, tmp_path_factory.mktemp("resume"))


def test_a_run_resumes_on_other_ranks_and_zero_stages(runs: Runs, tmp_path: Path) -> None:
    """The losses equal those of an uninterrupted run up to rounding."""
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    assert runs.ends(runs.start(whole, 2, 2, "--per_device_train_batch_size", 2)) == [0, 0], runs.log.read_text()
    for number, (ranks, stage) in enumerate(LAYOUTS):
        pids = runs.start(changing, ranks, stage, "--per_device_train_batch_size", 4 // ranks)
        if number < len(LAYOUTS) - 1:
            wait_for_records(changing, 4 * (number + 1), runs.log)
            os.kill(pids[-1], signal.SIGUSR1)
            assert runs.ends(pids) == [75] * ranks, runs.log.read_text()
    assert runs.ends(pids) == [0, 0], runs.log.read_text()
    for name in ("step", "dataset_task", "loss", "lr"):
        before, after = ([record[name] for record in records(run, "train")] for run in (whole, changing))
        assert len(before) == STEPS
        assert after == (pytest.approx(before, abs=1e-5) if name == "loss" else before)


def test_another_number_of_samples_per_step_is_refused(runs: Runs, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    pids = runs.start(directory, 2, 2, "--per_device_train_batch_size", 2)
    wait_for_records(directory, 2, runs.log)
    os.kill(pids[0], signal.SIGTERM)
    assert runs.ends(pids) == [75, 75]
    assert runs.ends(runs.start(directory, 1, 2, "--per_device_train_batch_size", 2)) == [2]
    status = json.loads((directory / "status.json").read_text())
    assert re.search("4 samples.* 2 .*--per_device_train_batch_size.* 4", status["message"])
