"""The status of a run of a sweep, for any content of its directory."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.sweep.expand import SweepRun
from lvlm_clorae.sweep.status import STATES, RunStatus, listed_jobs, read_status, run_status, run_statuses
from tests.helpers.sweeps import age, begin, finish, sweep_of


@pytest.fixture
def sweep_run(tmp_path: Path) -> SweepRun:
    return sweep_of(tmp_path, settings={"lora_rank": 8}).sweep_runs[0]


def test_a_run_without_files_is_waiting(sweep_run: SweepRun) -> None:
    assert run_status(sweep_run) == RunStatus("waiting")
    sweep_run.directory.mkdir(parents=True)
    assert run_status(sweep_run) == RunStatus("waiting")


def test_a_run_is_done_when_its_last_file_is_there(sweep_run: SweepRun, tmp_path: Path) -> None:
    directory = finish(sweep_run, dataset_task_entity=50.0)
    assert run_status(sweep_run).state == "done"
    (directory / "status.json").write_text(json.dumps({"state": "failed"}))
    assert run_status(sweep_run).state == "done"
    (directory / "status.json").unlink()
    assert run_status(sweep_run).state == "done"
    (directory / "adapter" / "schema.json").unlink()
    age(directory, 60)
    assert run_status(sweep_run).state == "interrupted", "scores.json is written before the adapter"
    [base] = sweep_of(tmp_path, sweep_runs=[{"adapter": "none"}]).sweep_runs
    finish(base, dataset_task_entity=50.0)
    assert run_status(base).state == "done"


def test_the_status_file_is_read(sweep_run: SweepRun) -> None:
    directory = begin(sweep_run, state="failed", message="\n error: no GPU\nTraceback", step=40, epoch=2)
    found = run_status(sweep_run)
    assert (found.state, found.error, found.step, found.epoch) == ("failed", "error: no GPU", 40, 2)
    assert found.age is not None
    assert found.age < 60
    for state, expected in (("interrupted", "interrupted"), ("running", "running"), ("done", "interrupted")):
        (directory / "status.json").write_text(json.dumps({"state": state, "message": "x"}))
        assert (run_status(sweep_run).state, run_status(sweep_run).error) == (expected, None)


def test_a_run_that_was_killed_is_interrupted(sweep_run: SweepRun) -> None:
    directory = begin(sweep_run, state="running", step=4, epoch=0, job="77_3")
    assert run_status(sweep_run).state == "running"
    age(directory, 31)
    assert run_status(sweep_run).state == "interrupted"
    assert run_status(sweep_run).age == pytest.approx(31 * 60, abs=30)
    assert run_status(sweep_run, stale_after=32).state == "running"
    assert run_status(sweep_run, jobs={"77_4"}).state == "interrupted"
    assert run_status(sweep_run, jobs={"77_3"}).state == "running"
    assert run_status(sweep_run, jobs=set(), stale_after=99).state == "interrupted", "its job is not in the queue"
    (directory / "metrics.jsonl").touch()
    assert run_status(sweep_run).state == "running", "a new metrics.jsonl counts as well"
    assert run_status(sweep_run, stale_after=0).state == "interrupted"
    os.utime(directory / "metrics.jsonl", (2e10, 2e10))
    assert run_status(sweep_run).age == 0, "the file server's clock is ahead"


def test_a_run_without_status_file_is_read_from_its_metrics(sweep_run: SweepRun) -> None:
    directory = begin(sweep_run)
    assert run_status(sweep_run).state == "running"
    records = [
        {"step": 10, "kind": "train", "epoch": 0},
        {"step": 12, "kind": "dev", "epoch": 1, "f1": {"a/entity": 30.5, "b/relation": 20}},
        {"step": 20, "kind": "train", "epoch": 1},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 30, "ki'
    (directory / "metrics.jsonl").write_text(text)
    found = run_status(sweep_run)
    assert (found.step, found.epoch, found.dev_all) == (20, 1, 50.5)


def test_a_directory_of_another_run_is_foreign(sweep_run: SweepRun, tmp_path: Path) -> None:
    finish(sweep_run, dataset_task_entity=50.0)
    [other] = sweep_of(tmp_path, settings={"lora_rank": 9}).sweep_runs
    assert other.directory == sweep_run.directory
    found = run_status(other)
    assert (found.state, found.step) == ("foreign", None)
    assert "rank = 8" in str(found.error)
    [same] = sweep_of(tmp_path, settings={"lora_rank": 8, "dataloader_num_workers": 2}).sweep_runs
    assert run_status(same).state == "done", "the number of workers does not change the result"
    (sweep_run.directory / "config.yaml").unlink()
    assert run_status(sweep_run).state == "foreign"


def test_a_file_in_place_of_the_directory_is_foreign(sweep_run: SweepRun) -> None:
    sweep_run.directory.parent.mkdir()
    sweep_run.directory.touch()
    assert run_status(sweep_run).state == "foreign"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"state": "flying"}', "{}", "[" * 100000, "\udcff"])
def test_a_damaged_status_file_is_ignored(text: str, sweep_run: SweepRun) -> None:
    directory = begin(sweep_run)
    (directory / "status.json").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    assert read_status(directory / "status.json") == {}
    assert run_status(sweep_run).state == "running"
    age(directory, 60)
    assert run_status(sweep_run).state == "interrupted"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
KEYS = ("state", "message", "step", "epoch", "job", "kind", "f1")
RECORDS = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON | st.sampled_from(["running", "dev", "failed"])))


@given(status=RECORDS | JSON, metrics=st.lists(RECORDS | JSON, max_size=3), tail=st.binary(max_size=20))
@settings(deadline=None, max_examples=60)
def test_no_content_is_an_error(status: Any, metrics: list[Any], tail: bytes, tmp_path_factory: Any) -> None:
    [sweep_run] = sweep_of(tmp_path_factory.mktemp("sweep")).sweep_runs
    directory = begin(sweep_run)
    (directory / "status.json").write_text(json.dumps(status))
    lines = "".join(json.dumps(record) + "\n" for record in metrics)
    (directory / "metrics.jsonl").write_bytes(lines.encode() + tail)
    found = run_status(sweep_run, jobs={"7"})
    assert found.state in STATES
    json.dumps(vars(found))


def squeue(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of that name first on the path."""
    folder.mkdir(exist_ok=True)
    path = folder / "squeue"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_queue_is_read_once_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(tmp_path, seeds=[0, 1, 2])
    for sweep_run, job in zip(sweep.sweep_runs, ("81", "80_2", "99"), strict=True):
        age(begin(sweep_run, state="running", job=job), 60)
    squeue(tmp_path / "bin", f"echo $@ >> {tmp_path}/calls; echo 81 80_1; echo 82 80_2", monkeypatch)
    assert listed_jobs() == {"81", "82", "80_1", "80_2"}
    assert [found.state for found in run_statuses(sweep.sweep_runs)] == ["running", "running", "interrupted"]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--me --noheader --array --format=%A %i"] * 2, "once, not for each run"
    squeue(tmp_path / "bin", "echo 81; exit 1", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: None)
        assert [found.state for found in run_statuses(sweep.sweep_runs)] == ["interrupted"] * 3
    assert capsys.readouterr().err.count("squeue") == 1


def test_a_failing_squeue_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = f"echo >> {tmp_path}/calls; [ $(wc -l < {tmp_path}/calls) -gt 2 ] && echo 81 81"
    squeue(tmp_path / "bin", count, monkeypatch)
    assert listed_jobs(pauses=(0, 0, 0)) == {"81"}


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert listed_jobs() is None
