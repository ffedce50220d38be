"""What goes wrong on one rank ends the job on all of them, soon, with the reason last."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.fork_server import ForkServer
from tests.launch import REPOSITORY, environment, records, small_shards, two_ranks_line

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SOON = 60.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("faults") / "shards", train=8, dev=2, test=2)


class Run:
    """The job with a fault, on two ranks, to its end."""

    def __init__(self, server: ForkServer, shards: Path, directory: Path, fault: str | None, *settings: object) -> None:
        log = directory.with_name("log")
        files = ["--deepspeed", REPOSITORY / "ds_configs/zero2.json", "--output", directory, "--shards", shards]
        fixed = ["--micro-batch", 2, "--log-every", 1, "--epochs", 1, "--max-answer-length", 16]
        started = time.monotonic()
        pids = server.start(2, log, *files, *fixed, "--checkpoint-every", 3, *settings, fault=fault)
        self.codes = [server.wait(pids[0])]
        if fault == "a_hang":
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


def test_an_exception_on_one_rank(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(server, shards, tmp_path / "run", "an_exception")
    assert run.codes == [1, 1]
    assert run.seconds < SOON
    assert run.log.rstrip().endswith("ValueError: the fault that this test causes"), run.log
    assert run.log.count("Traceback (most recent call last)") == 1, "of the rank that failed alone"
    assert (run.status["state"], run.status["rank"]) == ("failed", 1)
    assert run.status["message"] == "ValueError: the fault that this test causes"
    assert run.checkpoints == ["step-00000003"]


def test_the_launcher_ends_a_job_whose_ranks_never_met(shards: Path, tmp_path: Path) -> None:
    line = two_ranks_line("dying_worker.py", "--output", tmp_path / "run", "--shards", shards)
    started = time.monotonic()
    done = subprocess.run(line, env=environment(), capture_output=True, timeout=300, check=False)
    assert done.returncode != 0
    assert time.monotonic() - started < SOON
    assert not (tmp_path / "run").exists()


def test_a_rank_that_does_not_answer(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(server, shards, tmp_path / "run", "a_hang", "--collective-timeout", 0.1)
    assert run.codes == [1]
    assert run.seconds < SOON
    assert "Another rank is gone or does not answer" in run.log


def test_a_rank_that_dies_before_the_engine(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    """DeepSpeed's own group must be there by then: forming one waits half an hour for a rank that is gone."""
    run = Run(server, shards, tmp_path / "run", "a_death_before_the_engine")
    assert run.codes == [1, -signal.SIGKILL]
    assert run.seconds < SOON
    assert "Another rank is gone or does not answer" in run.log


def test_a_loss_that_is_nan_stops_the_run(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(server, shards, tmp_path / "run", "a_loss_that_is_nan")
    assert run.codes == [2, 2]
    assert "Traceback" not in run.log
    assert [record["step"] for record in records(run.directory, "train")] == [1, 2, 3]
    message = str(run.status["message"])
    assert message.startswith("The loss is not finite at step 4, of these samples: demo_")
    assert message.count("_train_") == 2, "one rank's micro-batch, not the other's"
    assert "--on-nonfinite skip" in message
    assert run.checkpoints == ["step-00000003"]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_that_is_nan_is_skipped(stage: int, server: ForkServer, shards: Path, tmp_path: Path) -> None:
    settings = ["--on-nonfinite", "skip", "--deepspeed", REPOSITORY / f"ds_configs/zero{stage}.json"]
    run = Run(server, shards, tmp_path / "run", "a_loss_that_is_nan", *settings)
    assert run.codes == [0, 0], run.log
    assert "The loss is not finite at step 4" in run.log
    assert "The step is skipped" in run.log
    steps = records(run.directory, "train")
    assert [step["step"] for step in steps if step["loss"] != step["loss"]] == [4]
    assert steps[-1]["skipped"] == 1


def test_weights_that_diverge(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(server, shards, tmp_path / "run", None, "--learning-rate", 1e30, "--on-nonfinite", "skip", "--epochs", 4)
    assert run.codes == [2, 2]
    assert "The last 10 steps were all like that. Lower learning_rate." in run.log


def test_a_full_disk(server: ForkServer, shards: Path, tmp_path: Path) -> None:
    run = Run(server, shards, tmp_path / "run", "a_full_disk")
    assert run.codes == [2, 2]
    assert "Traceback" not in run.log
    assert "step-00000003: the checkpoint could not be written" in run.log
    assert "Make room, then go on with the same command and --resume auto." in run.log
    assert run.checkpoints == []
