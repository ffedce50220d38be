"""How a point stands, whatever its directory holds."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.sweep.points import Point
from lvlm_clorae.sweep.standing import STATES, Standing, listed_jobs, read_status, standing, standings
from tests.sweep.helpers import age, begin, finish, sweep_of


@pytest.fixture
def point(tmp_path: Path) -> Point:
    return sweep_of(tmp_path, settings={"rank": 8}).points[0]


def test_nothing_is_there_yet(point: Point) -> None:
    assert standing(point) == Standing("waiting")
    point.directory.mkdir(parents=True)
    assert standing(point) == Standing("waiting")


def test_done_is_what_wrote_its_last_file(point: Point, tmp_path: Path) -> None:
    directory = finish(point, unit_entity=50.0)
    assert standing(point).state == "done"
    (directory / "status.json").write_text(json.dumps({"state": "failed"}))
    assert standing(point).state == "done"
    (directory / "status.json").unlink()
    assert standing(point).state == "done"
    (directory / "adapter" / "schema.json").unlink()
    age(directory, 60)
    assert standing(point).state == "interrupted", "scores.json comes before the adapter"
    [base] = sweep_of(tmp_path, points=[{"adapter": "none"}]).points
    finish(base, unit_entity=50.0)
    assert standing(base).state == "done"


def test_what_the_run_says(point: Point) -> None:
    directory = begin(point, state="failed", message="\n error: no GPU\nTraceback", step=40, epoch=2)
    found = standing(point)
    assert (found.state, found.error, found.step, found.epoch) == ("failed", "error: no GPU", 40, 2)
    assert found.age is not None
    assert found.age < 60
    for state, expected in (("interrupted", "interrupted"), ("running", "running"), ("done", "interrupted")):
        (directory / "status.json").write_text(json.dumps({"state": state, "message": "x"}))
        assert (standing(point).state, standing(point).error) == (expected, None)


def test_a_killed_run_says_that_it_runs(point: Point) -> None:
    directory = begin(point, state="running", step=4, epoch=0, job="77_3")
    assert standing(point).state == "running"
    age(directory, 31)
    assert standing(point).state == "interrupted"
    assert standing(point).age == pytest.approx(31 * 60, abs=30)
    assert standing(point, stale_after=32).state == "running"
    assert standing(point, jobs={"77_4"}).state == "interrupted"
    assert standing(point, jobs={"77_3"}).state == "running"
    (directory / "metrics.jsonl").touch()
    assert standing(point).state == "running", "metrics.jsonl is a sign of life too"
    assert standing(point, stale_after=0).state == "interrupted"
    os.utime(directory / "metrics.jsonl", (2e10, 2e10))
    assert standing(point).age == 0, "the file server's clock is ahead"


def test_a_run_without_status(point: Point) -> None:
    directory = begin(point)
    assert standing(point).state == "running"
    records = [
        {"step": 10, "kind": "train", "epoch": 0},
        {"step": 12, "kind": "dev", "epoch": 1, "f1": {"a/entity": 30.5, "b/relation": 20}},
        {"step": 20, "kind": "train", "epoch": 1},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 30, "ki'
    (directory / "metrics.jsonl").write_text(text)
    found = standing(point)
    assert (found.step, found.epoch, found.dev_all) == (20, 1, 50.5)


def test_a_directory_of_another_run(point: Point, tmp_path: Path) -> None:
    finish(point, unit_entity=50.0)
    [other] = sweep_of(tmp_path, settings={"rank": 9}).points
    assert other.directory == point.directory
    found = standing(other)
    assert (found.state, found.step) == ("foreign", None)
    assert "rank = 8, but this one has 9" in str(found.error)
    [same] = sweep_of(tmp_path, settings={"rank": 8, "workers": 2}).points
    assert standing(same).state == "done", "workers do not change the result"
    (point.directory / "config.yaml").unlink()
    assert "holds no run" in str(standing(point).error)


def test_a_file_where_the_directory_should_be(point: Point) -> None:
    point.directory.parent.mkdir()
    point.directory.touch()
    assert standing(point).state == "foreign"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"state": "flying"}', "{}", "[" * 100000, "\udcff"])
def test_damaged_status(text: str, point: Point) -> None:
    directory = begin(point)
    (directory / "status.json").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    assert read_status(directory / "status.json") == {}
    assert standing(point).state == "running"
    age(directory, 60)
    assert standing(point).state == "interrupted"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
KEYS = ("state", "message", "step", "epoch", "job", "kind", "f1")
RECORDS = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON | st.sampled_from(["running", "dev", "failed"])))


@given(status=RECORDS | JSON, metrics=st.lists(RECORDS | JSON, max_size=3), tail=st.binary(max_size=20))
@settings(deadline=None, max_examples=60)
def test_no_content_is_an_error(status: Any, metrics: list[Any], tail: bytes, tmp_path_factory: Any) -> None:
    [point] = sweep_of(tmp_path_factory.mktemp("sweep")).points
    directory = begin(point)
    (directory / "status.json").write_text(json.dumps(status))
    lines = "".join(json.dumps(record) + "\n" for record in metrics)
    (directory / "metrics.jsonl").write_bytes(lines.encode() + tail)
    found = standing(point, jobs={"7"})
    assert found.state in STATES
    json.dumps(vars(found))


def squeue(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name, first on the path."""
    folder.mkdir(exist_ok=True)
    path = folder / "squeue"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_queue_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of(tmp_path, seeds=[0, 1, 2])
    for point, job in zip(sweep.points, ("81", "80_2", "99"), strict=True):
        age(begin(point, state="running", job=job), 60)
    squeue(tmp_path / "bin", f"echo $@ >> {tmp_path}/calls; echo 81 80_1; echo 82 80_2", monkeypatch)
    assert listed_jobs() == {"81", "82", "80_1", "80_2"}
    assert [found.state for found in standings(sweep.points)] == ["running", "running", "interrupted"]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--me --noheader --array --format=%A %i"] * 2, "once, not for each point"
    squeue(tmp_path / "bin", "echo 81; exit 1", monkeypatch)
    assert [found.state for found in standings(sweep.points)] == ["interrupted"] * 3


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert listed_jobs() == frozenset()
