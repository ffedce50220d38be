"""Ranks, signals, failures and nodes in the batch scripts, with a replacement of train.py."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.project import project
from tests.cluster.slurm import Slurm, until
from tests.helpers.launch import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


class Trial:
    """A project with the batch scripts and the replacement of train.py, and one job."""

    def __init__(self, slurm: Slurm, directory: Path) -> None:
        self.slurm, self.directory, self.output = slurm, project(directory), directory / "run"
        (directory / "train.py").unlink()
        shutil.copy(Path(__file__).with_name("stand_in.py"), directory / "train.py")
        self.output.mkdir()

    def submit(self, *flags: str, nodes: int = 2, tasks: int = 1, arguments: tuple[object, ...] = ()) -> None:
        """Submit the job, with one GPU a task unless ``flags`` override it."""
        shape = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--cpus-per-task=1"]
        given = ["--output_dir", self.output, "--resume_from_checkpoint", "auto", *arguments]
        words = [*shape, *flags, "slurm/train.sbatch", *given]
        self.job = self.slurm.submit(*words, cwd=self.directory)
        self.log = self.directory / f"slurm/logs/clorae-{self.job}.out"
        self.ranks = nodes * tasks

    def lines(self, rank: int) -> list[Any]:
        path = self.output / f"rank-{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def started(self, times: int = 1) -> None:
        """Wait until every rank has started ``times`` times."""

        def reached() -> bool:
            starts = [sum(isinstance(line, dict) for line in self.lines(rank)) for rank in range(self.ranks)]
            return min(starts) >= times

        until(reached, 300, lambda: f"{self.slurm.show(self.job)}\n{self.slurm.logs()}")

    def end(self, code: int = 0) -> None:
        """End the ranks and wait for the job."""
        (self.output / "end").write_text(str(code))
        self.wait("FAILED" if code else "COMPLETED")

    def wait(self, state: str) -> None:
        self.slurm.wait(self.job, state, 300, self.log)

    def show(self) -> dict[str, str]:
        [row] = self.slurm.show(self.job)
        return row

    def check_restart(self) -> None:
        """Check that every rank saved, restarted and finished."""
        self.started(times=2)
        self.end()
        for rank in range(self.ranks):
            assert [line if line == "saved" else "start" for line in self.lines(rank)] == ["start", "saved", "start"]
        assert self.show()["Restarts"] == "1"


@pytest.fixture
def trial(cluster: Slurm, tmp_path: Path) -> Trial:
    return Trial(cluster, tmp_path / "project")


@pytest.mark.parametrize(
    ("flags", "locals_", "visible"),
    [((), ["0", "1"], ["0,1", "0,1"]), (("--gpus-per-task=1",), ["0", "0"], ["0", "1"])],
)
def test_ranks_and_their_gpus(trial: Trial, flags: tuple[str, ...], locals_: list[str], visible: list[str]) -> None:
    """LOCAL_RANK is the index of the device among those visible to the task."""
    trial.submit(*flags, tasks=2)
    trial.started()
    trial.end()
    found = [trial.lines(rank)[0] for rank in range(4)]
    assert [line["RANK"] for line in found] == ["0", "1", "2", "3"]
    assert [line["LOCAL_RANK"] for line in found] == locals_ * 2
    assert [line["CUDA_VISIBLE_DEVICES"] for line in found] == visible * 2
    assert {(line["WORLD_SIZE"], line["LOCAL_WORLD_SIZE"]) for line in found} == {("4", "2")}
    hosts = [line["host"] for line in found]
    assert hosts == [hosts[0]] * 2 + [hosts[2]] * 2 != [hosts[0]] * 4
    assert {line["MASTER_ADDR"] for line in found} == {hosts[0]}
    (port,) = {line["MASTER_PORT"] for line in found}
    assert 10000 <= int(port) < 30000


def test_ranks_without_gpus_on_uneven_nodes(trial: Trial) -> None:
    trial.submit("--gpus-per-node=0", "--ntasks=4", "--distribution=cyclic", nodes=3, tasks=2)
    trial.ranks = 4
    trial.started()
    trial.end()
    found = [trial.lines(rank)[0] for rank in range(4)]
    assert sorted(line["LOCAL_WORLD_SIZE"] for line in found) == ["1", "1", "2", "2"]
    assert {line["CUDA_VISIBLE_DEVICES"] for line in found} <= {None, ""}
    for line in found:
        together = sorted(other["LOCAL_RANK"] for other in found if other["host"] == line["host"])
        assert together == [str(rank) for rank in range(int(line["LOCAL_WORLD_SIZE"]))]


def test_more_tasks_than_gpus_is_an_error(trial: Trial) -> None:
    trial.submit("--gpus-per-node=1", tasks=2)
    trial.wait("FAILED")
    assert trial.show()["ExitCode"] == "2:0"
    assert "--ntasks-per-node" in trial.log.read_text()


@pytest.mark.parametrize("code", [1, 2])
def test_a_fault_is_not_requeued(trial: Trial, code: int) -> None:
    trial.submit()
    trial.started()
    trial.end(code)
    assert (trial.show()["ExitCode"], trial.show()["Restarts"]) == (f"{code}:0", "0")


def test_ranks_that_wait_for_a_failed_rank_are_killed(trial: Trial) -> None:
    trial.submit("--export=ALL,STEP_WAIT=1")
    trial.started()
    (trial.output / "end-1").write_text("1")
    trial.wait("FAILED")
    assert len(trial.lines(0)) == 1
    assert trial.show()["Restarts"] == "0"


def test_a_job_submitted_from_another_directory(trial: Trial, tmp_path: Path) -> None:
    """The batch script finds the project through LVLM_CLORAE_HOME."""
    trial.submit(f"--export=ALL,LVLM_CLORAE_HOME={trial.directory}", f"--chdir={tmp_path}", f"--output={tmp_path}/log")
    trial.started()
    trial.end()


@pytest.mark.parametrize("flags", [("--batch", "--signal=USR1"), ("--signal=TERM",)])
def test_a_signal_saves_and_requeues(trial: Trial, flags: tuple[str, ...]) -> None:
    """The signal goes to the batch script or, as with preemption on most sites, to the tasks."""
    trial.submit(tasks=2)
    trial.started()
    trial.slurm.run("scancel", *flags, trial.job)
    trial.check_restart()


def test_a_signal_before_the_ranks_handle_signals_is_not_lost(trial: Trial) -> None:
    trial.submit(arguments=("--deaf", 3))
    trial.started()
    trial.slurm.run("scancel", "--batch", "--signal=USR1", trial.job)
    trial.check_restart()


def test_ranks_killed_by_preemption_while_they_start_are_requeued(trial: Trial) -> None:
    trial.submit(arguments=("--deaf", 600))
    trial.started()
    trial.slurm.run("scancel", "--signal=TERM", trial.job)
    trial.started(times=2)
    trial.end()


def test_the_time_limit_saves_and_requeues(trial: Trial) -> None:
    trial.submit("--time=1", "--signal=B:USR1@58")
    trial.started()
    trial.check_restart()


def test_without_requeue_the_job_exits_with_75(trial: Trial) -> None:
    trial.submit("--no-requeue")
    trial.started()
    trial.slurm.run("scancel", "--batch", "--signal=USR1", trial.job)
    trial.wait("FAILED")
    assert trial.show()["ExitCode"] == "75:0"


@pytest.mark.parametrize("flags", [(), ("--full",)])
def test_a_cancelled_job_stays_cancelled(trial: Trial, flags: tuple[str, ...]) -> None:
    """Its ranks save and exit with 75, whether or not the batch script gets the signal."""
    trial.submit()
    trial.started()
    trial.slurm.run("scancel", *flags, trial.job)
    trial.wait("CANCELLED")
    assert trial.lines(0)[1:] == ["saved"]
    assert trial.show()["Restarts"] == "0"


def test_preemption_saves_and_requeues(trial: Trial) -> None:
    trial.submit(nodes=3)
    trial.started()
    urgent = trial.slurm.submit("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=hostname")
    trial.slurm.wait(urgent, timeout=300)
    trial.check_restart()


def test_a_dead_node_requeues(trial: Trial) -> None:
    """The batch script ran on the dead node. The job restarts on the other nodes."""
    trial.submit()
    trial.started()
    dead = trial.lines(0)[0]["host"]
    trial.slurm.kill_node(dead)
    try:
        trial.started(times=2)
        trial.end()
        assert {trial.lines(rank)[-1]["host"] for rank in range(2)} == set(trial.slurm.names) - {dead}
        assert trial.show()["Restarts"] == "1"
    finally:
        trial.slurm.start_node(dead)


def test_a_job_that_makes_no_progress_is_not_requeued_for_ever(trial: Trial) -> None:
    """Interrupted at steps 5, 5, 7, 7 and 7: the third time at one step ends it."""
    trial.submit("--export=ALL,MAX_STALLED=3", nodes=1)
    for restart, step in enumerate((5, 5, 7, 7, 7), 1):
        trial.started(times=restart)
        (trial.output / "status.json").write_text(json.dumps({"state": "interrupted", "step": step, "epoch": 1}))
        trial.slurm.run("scancel", "--batch", "--signal=USR1", trial.job)
    trial.wait("FAILED")
    assert (trial.show()["ExitCode"], trial.show()["Restarts"]) == ("75:0", "4")


@pytest.mark.parametrize(("failures", "state"), [(2, "COMPLETED"), (99, "FAILED")])
def test_a_failing_squeue_is_tried_again(trial: Trial, failures: int, state: str) -> None:
    replacement = trial.directory / "bin" / "squeue"
    replacement.parent.mkdir()
    replacement.write_text(
        f"""#!/bin/sh
echo >> {trial.directory}/calls
[ $(wc -l < {trial.directory}/calls) -gt {failures} ] && echo RUNNING
"""
    )
    replacement.chmod(0o755)
    path = f"{replacement.parent}:{os.environ['PATH']}"
    trial.submit(f"--export=ALL,PATH={path}", nodes=1)
    trial.started()
    trial.slurm.run("scancel", "--batch", "--signal=USR1", trial.job)
    if state == "COMPLETED":
        trial.check_restart()
    else:
        trial.wait("FAILED")
        assert "squeue fails" in trial.log.read_text()


def test_a_port_in_use_is_not_chosen() -> None:
    with socket.socket() as used:
        port = _in_job_sh("RANDOM=1; free_port")
        assert port == _in_job_sh("RANDOM=1; free_port")
        used.bind(("127.0.0.1", int(port)))
        used.listen()
        assert _in_job_sh("RANDOM=1; free_port") != port
    assert len({_in_job_sh("free_port") for _ in range(4)}) > 1


def _in_job_sh(script: str) -> str:
    line = ["bash", "-c", f"source {REPOSITORY}/slurm/job.sh; {script}"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
