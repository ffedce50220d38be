"""An error on one rank ends the run on all ranks within a minute and is reported once."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lvlm_clorae.training.loop import MAX_SKIPPED
from tests.helpers.fork_server import ForkServer
from tests.helpers.launch import REPOSITORY, environment, records, small_shards, two_ranks_line

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SOON = 60.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("faults") / "shards", train=8, dev=2, test=2)


class Run:
    """A run with a fault on two ranks, to its end."""

    def __init__(self, server: ForkServer, shards: Path, directory: Path, fault: str | None, *settings: object) -> None:
        log = directory.with_name("log")
        files = ["--deepspeed", REPOSITORY / "ds_configs/zero2.json", "--output_dir", directory, "--shards", shards]
        fixed = [
            "--per_device_train_batch_size",
            2,
            "--logging_steps",
            1,
            "--num_train_epochs",
            1,
            "--max_target_length",
            16,
        ]
        started = time.monotonic()
        pids = server.start(2, log, *files, *fixed, "--save_steps", 3, *settings, fault=fault)
        self.codes = [server.wait(pids[0])]
        if fault == "hang":
            server.kill(pids[1])
        else:
            self.codes.append(server.wait(pids[1]))
        self.seconds = time.monotonic() - started
        self.log, self.directory = log.read_text(), directory

    @property
    def status(self) -> dict[str, object]:
        content: dict[str, object] = json.loads((self.directory / "status.json").read_text())
        return content

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "checkpoints").iterdir())


def test_an_exception_on_one_rank_ends_both(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(server, shards, tmp_path / "run", "raise_exception")
    assert run.codes == [1, 1]
    assert run.seconds < SOON
    assert run.log.rstrip().endswith("ValueError: the injected fault"), run.log
    assert run.log.count("Traceback (most recent call last)") == 1, "only of the rank that failed"
    assert (run.status["state"], run.status["rank"]) == ("failed", 1)
    assert run.status["message"] == "ValueError: the injected fault"
    assert run.checkpoints == ["step-00000003"]


def test_the_launcher_ends_a_run_if_a_rank_dies_before_the_rendezvous(shards: Path, tmp_path: Path) -> None:
    line = two_ranks_line("dying_worker.py", "--output_dir", tmp_path / "run", "--shards", shards)
    started = time.monotonic()
    done = subprocess.run(line, env=environment(), capture_output=True, timeout=300, check=False)
    assert done.returncode != 0
    assert time.monotonic() - started < SOON
    assert not (tmp_path / "run").exists()


def test_a_rank_that_hangs_ends_the_run_after_the_timeout(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(server, shards, tmp_path / "run", "hang", "--ddp_timeout", 6)
    assert run.codes == [1]
    assert run.seconds < SOON


def test_a_rank_that_dies_before_the_engine_ends_the_run(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    """DeepSpeed's own process group must exist by then: creating it would wait 30 minutes for the missing rank."""
    run = Run(server, shards, tmp_path / "run", "die_before_engine")
    assert run.codes == [1, -signal.SIGKILL]
    assert run.seconds < SOON


def test_a_nan_loss_stops_the_run(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(server, shards, tmp_path / "run", "nan_loss")
    assert run.codes == [2, 2]
    assert "Traceback" not in run.log
    assert [record["step"] for record in records(run.directory, "train")] == [1, 2, 3]
    message = str(run.status["message"])
    assert "step 4" in message
    assert message.count("_train_") == 2, "the samples of one rank's micro-batch"
    assert "--on_nonfinite_loss skip" in message
    assert run.checkpoints == ["step-00000003"]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_with_a_nan_loss_is_skipped(stage: int, server: ForkServer, shards: Path, tmp_path: Path) -> None:
    settings = ["--on_nonfinite_loss", "skip", "--deepspeed", REPOSITORY / f"ds_configs/zero{stage}.json"]
    run = Run(server, shards, tmp_path / "run", "nan_loss", *settings)
    assert run.codes == [0, 0], run.log
    named = [line for line in run.log.splitlines() if "not finite" in line]
    assert "".join(named).count("_train_") == 2, "the samples are named"
    steps = records(run.directory, "train")
    assert [step["step"] for step in steps if step["loss"] != step["loss"]] == [4]
    assert steps[-1]["skipped"] == 1


def test_diverged_weights_end_a_run_that_skips_steps(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(
        server,
        shards,
        tmp_path / "run",
        None,
        "--learning-rate",
        1e30,
        "--on_nonfinite_loss",
        "skip",
        "--num_train_epochs",
        4,
    )
    assert run.codes == [2, 2]
    assert str(MAX_SKIPPED) in str(run.status["message"])
    assert "learning_rate" in str(run.status["message"])


def test_a_full_disk_ends_the_run_with_a_message(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(server, shards, tmp_path / "run", "full_disk")
    assert run.codes == [2, 2]
    assert "Traceback" not in run.log
    assert "step-00000003" in run.log
    assert "--resume_from_checkpoint auto" in run.log
    assert run.checkpoints == []


def test_a_port_in_use_is_a_line_with_the_flag(shards: Path, tmp_path: Path) -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        settings = {**environment(), **ranks, "MASTER_PORT": str(used.getsockname()[1])}
        line = [
            sys.executable,
            str(REPOSITORY / "train.py"),
            "--shards",
            str(shards),
            "--output_dir",
            str(tmp_path / "run"),
        ]
        done = subprocess.run(
            line, cwd=REPOSITORY, env=settings, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: Port ")
    assert "--master_port" in done.stderr
