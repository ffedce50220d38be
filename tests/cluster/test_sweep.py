"""The sweep commands of slurm/README.md: four runs as a job array, then their scores."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lvlm_clorae.cli import main as cli
from tests.cluster.project import SLURM_PAGE, project
from tests.cluster.slurm import Slurm
from tests.helpers.launch import small_shards
from tests.helpers.pages import commands

SWEEP = """
output_dir: runs/sweep
settings: {{shards: {shards}, num_train_epochs: 1, max_steps: 2, max_target_length: 8, per_device_train_batch_size: 2}}
grid:
  lora_rank: [4, 8]
  gamma: [1.0, 2.0]
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_an_array_of_four_sweep_runs_and_its_scores(
    cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = project(tmp_path / "project")
    shards = small_shards(tmp_path / "shards", train=4, dev=1, test=1)
    (directory / "sweep.yaml").write_text(SWEEP.format(shards=shards))
    monkeypatch.chdir(directory)
    [expand, collect] = [shlex.split(line)[1:] for line in commands(SLURM_PAGE, "lvlm-clorae")]
    [submit] = [shlex.split(line) for line in commands(SLURM_PAGE, "sbatch --array")]
    assert cli(expand) == 0
    assert shlex.join(submit) in capsys.readouterr().out.splitlines()

    def submitted() -> list[str]:
        """Run the array to its end and return the logs of its elements."""
        shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
        job = cluster.submit(submit[1], *shape, *submit[2:], cwd=directory)
        logs = [directory / f"slurm/logs/clorae-sweep-{job}-{number}.out" for number in range(4)]
        cluster.wait(job, log=logs[0])
        return [log.read_text() for log in logs]

    submitted()
    assert cli(collect) == 0
    rows = json.loads((directory / "runs/sweep/sweep.json").read_text())["rows"]
    assert [row["settings"] for row in rows] == [
        {"lora_rank": rank, "gamma": gamma} for rank in (4, 8) for gamma in (1.0, 2.0)
    ]
    assert all(row["scores"]["All"]["values"] for row in rows)
    assert all("already finished" in log for log in submitted())
