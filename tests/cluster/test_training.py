"""train.py itself on a cluster: two nodes give what two local ranks give, whatever happens to the job meanwhile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, read, until
from tests.launch import records, small_shards, train

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
SETTINGS = ["--micro-batch", 2, "--epochs", 1, "--log-every", 1, "--max-answer-length", 16]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("cluster") / "shards")


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks of this machine, undisturbed."""
    directory = tmp_path_factory.mktemp("local") / "run"
    train(directory, 2, "--shards", shards, *SETTINGS)
    return directory


def submit(cluster: Slurm, shards: Path, directory: Path, *settings: object) -> tuple[str, Path]:
    """A job of one rank on each of two nodes; returns its id and its log."""
    log = directory.with_name("job.out")
    shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={log}"]
    given = ["--deepspeed", "ds_configs/zero2.json", "--output", directory, "--shards", shards, "--resume", "auto"]
    return cluster.submit(*shape, "slurm/train.sbatch", *given, *SETTINGS, *settings), log


def test_two_nodes_give_what_two_local_ranks_give(cluster: Slurm, shards: Path, local: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    job, log = submit(cluster, shards, directory)
    cluster.wait(job, log=log)
    assert "2 rank(s) on cpu" in log.read_text()
    alone, together = records(local, "train"), records(directory, "train")
    assert len(alone) == len(together) == 30
    for name in ("loss", "ce", "mim"):
        assert max(abs(a[name] - b[name]) for a, b in zip(alone, together, strict=True)) < 1e-6, name
    assert records(directory, "dev") == records(local, "dev")


def test_a_run_that_is_warned_preempted_and_loses_a_node_ends_as_if_nothing_had_happened(
    cluster: Slurm, shards: Path, local: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    job, log = submit(cluster, shards, directory, "--checkpoint-every", 3)

    def reach(step: int) -> None:
        """Wait until the run, as it is now, has done this step."""

        def reached() -> bool:
            found = [int(record["step"]) for record in records(directory, "train")] if metrics.exists() else []
            assert max(found, default=0) < 30, "the run ended before it could be disturbed"
            return step in found

        metrics = directory / "metrics.jsonl"
        until(reached, 240, lambda: f"{cluster.show(job)}\n{read(log)}\n{cluster.logs()}")

    def restarts() -> int:
        [row] = cluster.show(job)
        return int(row["Restarts"])

    reach(2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: restarts() == 1, 120, lambda: read(log))

    reach(saved(log)[0] + 2)
    urgent = cluster.submit("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=hostname")
    cluster.wait(urgent, timeout=120)
    until(lambda: restarts() == 2, 120, lambda: read(log))

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
    """The steps at which the run was saved because it was interrupted."""
    return [int(step) for step in re.findall(r"interrupted: saved at step (\d+)", log.read_text())]
