"""A run goes on with another number of ranks, and under another ZeRO stage, where it stood."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.fork_server import ForkServer, wait_for_records
from tests.launch import REPOSITORY, records, small_shards

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
STEPS = 20
SETTINGS = ["--dropout", 0, "--learning-rate", 1e-3, "--max-steps", STEPS, "--epochs", 2, "--log-every", 1]
# Ranks and ZeRO stage, one after another in one run.
LAYOUTS = [(2, 2), (1, 3), (2, 3), (1, 1), (2, 2)]


class Runs:
    """Of one base on the same samples."""

    def __init__(self, server: ForkServer, base: Path, folder: Path) -> None:
        self.server, self.base, self.log = server, base, folder / "log"
        self.shards = small_shards(folder / "shards", train=24, dev=0, test=0)

    def start(self, directory: Path, ranks: int, stage: int, *more: object) -> list[int]:
        files = ["--deepspeed", REPOSITORY / f"ds_configs/zero{stage}.json", "--output", directory]
        if stage == 1:
            (directory.parent / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
            files[1] = directory.parent / "zero1.json"
        data = ["--shards", self.shards, "--model", self.base, "--resume", "auto"]
        return self.server.start(ranks, self.log, *files, *data, *SETTINGS, *more)

    def ends(self, pids: list[int]) -> list[int]:
        return [self.server.wait(pid) for pid in pids]


@pytest.fixture(scope="module")
def runs(server: ForkServer, fresh_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(server, fresh_base, tmp_path_factory.mktemp("resume"))


def test_on_other_ranks_and_stages(runs: Runs, tmp_path: Path) -> None:
    """The losses are those of a run in which nothing changed, to rounding."""
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    assert runs.ends(runs.start(whole, 2, 2, "--micro-batch", 2)) == [0, 0], runs.log.read_text()
    for number, (ranks, stage) in enumerate(LAYOUTS):
        pids = runs.start(changing, ranks, stage, "--micro-batch", 4 // ranks)
        if number < len(LAYOUTS) - 1:
            wait_for_records(changing, 4 * (number + 1), runs.log)
            os.kill(pids[-1], signal.SIGUSR1)
            assert runs.ends(pids) == [75] * ranks, runs.log.read_text()
    assert runs.ends(pids) == [0, 0], runs.log.read_text()
    assert runs.log.read_text().count("resumed from") == len(LAYOUTS) - 1
    for name in ("step", "unit", "loss", "lr"):
        before, after = ([record[name] for record in records(run, "train")] for run in (whole, changing))
        assert len(before) == STEPS
        assert after == (pytest.approx(before, abs=1e-5) if name == "loss" else before)


def test_another_number_of_samples_a_step_is_refused(runs: Runs, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    pids = runs.start(directory, 2, 2, "--micro-batch", 2)
    wait_for_records(directory, 2, runs.log)
    os.kill(pids[0], signal.SIGTERM)
    assert runs.ends(pids) == [75, 75]
    assert runs.ends(runs.start(directory, 1, 2, "--micro-batch", 2)) == [2]
    told = runs.log.read_text()
    assert "was written by a run with 4 samples an optimizer step, but this one has 2 (1 ranks x micro_batch 2" in told
    assert "Set --micro-batch and --accumulation so that the product is 4." in told
