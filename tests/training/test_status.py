"""status.json: rank 0 tells how far a run is, the first rank that fails why."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.training import status as module
from lvlm_clorae.training.status import STATUS, Status, slurm_job


def read(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / STATUS).read_text())
    return content


def test_a_run_from_its_start_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PULSE_SECONDS", 0.0)
    status = Status(tmp_path, 0)
    status.start()
    first = read(tmp_path)
    assert (first["state"], first["step"]) == ("running", 0)
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(first["time"])).total_seconds()) < 60
    status.reached(7, 1)
    assert (read(tmp_path)["step"], read(tmp_path)["epoch"]) == (7, 1)
    status.end("done")
    assert read(tmp_path) | {"time": ""} == {**first, "state": "done", "step": 7, "epoch": 1, "time": ""}


def test_not_written_at_every_step(tmp_path: Path) -> None:
    status = Status(tmp_path, 0)
    status.start()
    status.reached(7, 1)
    assert read(tmp_path)["step"] == 0
    status.end("interrupted", "saved at step 7")
    assert (read(tmp_path)["step"], read(tmp_path)["message"]) == (7, "saved at step 7")


def test_the_first_failure_is_told(tmp_path: Path) -> None:
    ranks = [Status(tmp_path, rank) for rank in range(3)]
    for status in ranks:
        status.start()
    assert ranks[2].fail("ValueError: broken", "Traceback ...")
    assert not ranks[0].fail("RuntimeError: Connection closed by peer", "Traceback ...")
    assert (read(tmp_path)["rank"], read(tmp_path)["message"]) == (2, "ValueError: broken")
    ranks[0].start()  # another attempt
    assert read(tmp_path)["state"] == "running"


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    status = Status(tmp_path, 1)
    status.start()
    status.reached(7, 1)
    status.end("done")
    assert not (tmp_path / STATUS).exists()


def test_the_job_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert slurm_job() == "41"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert slurm_job() == "40_1"
