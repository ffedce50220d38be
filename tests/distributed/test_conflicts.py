"""Gradients are measured over all ranks, in the real engine, without a trace in what is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.fork_server import ForkServer
from tests.launch import REPOSITORY, records, small_shards

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ADAPTER = "adapter/adapter_model.safetensors"
SETTINGS = ["--epochs", 1, "--max-steps", 8, "--log-every", 1, "--checkpoint-every", 3, "--max-answer-length", 16]


class Runs:
    def __init__(self, server: ForkServer, base: Path, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.shards = small_shards(folder / "shards", train=24, dev=0, test=0)
        self.same = ["--model", base, "--shards", self.shards, *SETTINGS]
        (folder / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')

    def run(
        self, name: str, ranks: int, *more: object, stage: int = 2, codes: int = 0, fault: str | None = None
    ) -> Path:
        log = self.folder / f"{name}.log"
        file = self.folder / "zero1.json" if stage == 1 else REPOSITORY / f"ds_configs/zero{stage}.json"
        files = ["--deepspeed", file, "--output", self.folder / name, "--micro-batch", 4 // ranks]
        pids = self.server.start(ranks, log, *files, *self.same, *more, fault=fault)
        assert [self.server.wait(pid) for pid in pids] == [codes] * ranks, log.read_text()
        return self.folder / name


@pytest.fixture(scope="module")
def runs(server: ForkServer, fresh_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(server, fresh_base, tmp_path_factory.mktemp("conflicts"))


@pytest.fixture(scope="module")
def measuring(runs: Runs) -> Path:
    return runs.run("measuring", 2, "--log-conflicts", 2)


def same(first: Path, second: Path) -> None:
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    assert records(first, "train") == records(second, "train")


def test_what_is_trained_is_the_same_bit_for_bit(runs: Runs, measuring: Path) -> None:
    same(measuring, runs.run("silent", 2))
    assert [record["step"] for record in records(measuring, "conflicts")] == [0, 2, 4, 6]
    assert (measuring / "conflicts.png").is_file()


@pytest.mark.parametrize("settings", [["--adapter", "lora"], ["--accumulation", 2, "--precision", "bf16"]])
def test_so_it_is_under_zero_1(settings: list[object], runs: Runs) -> None:
    name = settings[-1]
    measured = runs.run(f"measured-{name}", 2, "--log-conflicts", 2, "--max-steps", 4, *settings, stage=1)
    same(measured, runs.run(f"silent-{name}", 2, "--max-steps", 4, *settings, stage=1))
    assert len(records(measured, "conflicts")) == 2


def test_two_ranks_measure_what_one_does(runs: Runs, measuring: Path) -> None:
    alone = runs.run("alone", 1, "--log-conflicts", 2, "--max-steps", 1)
    (one,), (two, *_) = records(alone, "conflicts"), records(measuring, "conflicts")
    assert one["units"] == two["units"]
    assert np.abs(np.array(one["matrix"]) - np.array(two["matrix"])).max() < 1e-4


def test_a_run_that_was_told_to_stop_in_a_measurement_measures_again(runs: Runs, measuring: Path) -> None:
    stopped = runs.run("stopped", 2, "--log-conflicts", 2, codes=75, fault="told_to_stop_in_a_measurement")
    assert [record["step"] for record in records(stopped, "conflicts")] == [0, 2]
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    runs.run("stopped", 2, "--log-conflicts", 2, "--resume", "auto")
    same(stopped, measuring)
    assert records(stopped, "conflicts") == records(measuring, "conflicts")
