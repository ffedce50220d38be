"""train.py on a cluster: two nodes give the results of two local ranks, also after interruptions."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.cluster.project import SETTINGS, SLURM_PAGE, project
from tests.cluster.slurm import Slurm, read, until
from tests.helpers.launch import records
from tests.helpers.pages import commands

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
WEIGHTS = "adapter/adapter_model.safetensors"


class Run:
    """The command of slurm/README.md as a job with one rank on each of two nodes."""

    def __init__(self, cluster: Slurm, directory: Path, *settings: object) -> None:
        home = project(directory)
        self.directory = home / "runs/mine"
        [line] = commands(SLURM_PAGE, "sbatch slurm/train.sbatch")
        words = shlex.split(line)[1:]
        shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
        self.job = cluster.submit(*shape, *words, *SETTINGS, *settings, cwd=home)
        self.log = home / f"slurm/logs/clorae-{self.job}.out"


def test_two_nodes_give_the_results_of_two_local_ranks(
    cluster: Slurm, shards: Path, local: Path, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path / "project", "--shards", shards)
    job, log, directory = run.job, run.log, run.directory
    cluster.wait(job, log=log)
    alone, together = records(local, "train"), records(directory, "train")
    assert len(alone) == len(together) == 30
    for name in ("loss", "ce", "mim"):
        assert max(abs(a[name] - b[name]) for a, b in zip(alone, together, strict=True)) < 1e-6, name
    assert records(directory, "dev") == records(local, "dev")


def test_a_run_that_is_signalled_preempted_and_loses_a_node_gives_the_same_result(
    cluster: Slurm, shards: Path, local: Path, tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path / "project", "--shards", shards, "--save_steps", 3)
    job, log, directory = run.job, run.log, run.directory

    def reach(step: int) -> None:
        """Wait until the current attempt of the run has done this step."""

        def reached() -> bool:
            found = [int(record["step"]) for record in records(directory, "train")] if metrics.exists() else []
            assert max(found, default=0) < 30, "the run ended before it could be interrupted"
            return step in found

        metrics = directory / "metrics.jsonl"
        until(reached, 900, lambda: f"{cluster.show(job)}\n{read(log)}\n{cluster.logs()}")

    def restarts() -> int:
        [row] = cluster.show(job)
        return int(row["Restarts"])

    reach(2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: restarts() == 1, 600, lambda: read(log))

    reach(saved(log)[0] + 2)
    urgent = cluster.submit("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=hostname")
    cluster.wait(urgent, timeout=600)
    until(lambda: restarts() == 2, 600, lambda: read(log))

    reach(saved(log)[1] + 4)
    [row] = cluster.show(job)
    lost = cluster.run("scontrol", "show", "hostnames", row["NodeList"]).split()[1]
    cluster.kill_node(lost)
    try:
        cluster.wait(job, log=log)
    finally:
        cluster.start_node(lost)
    assert restarts() == 3
    printed = log.read_text()
    assert len(saved(log)) == 2, printed
    assert printed.count("resumed from") == 3, printed
    assert (directory / WEIGHTS).read_bytes() == (local / WEIGHTS).read_bytes()
    for kind in ("train", "dev"):
        assert records(directory, kind) == records(local, kind)


def saved(log: Path) -> list[int]:
    """Return the steps at which the run was interrupted and saved."""
    return [int(step) for step in re.findall(r"saved at step (\d+)", log.read_text())]
