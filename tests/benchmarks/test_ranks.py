"""The benchmark of ranks on a tiny model compares two ranks with one and overwrites nothing."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LINE = [sys.executable, str(REPOSITORY / "benchmarks/ranks.py"), "--quick", "--samples", "2"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_quick_run(tmp_path: Path) -> None:
    line = [*LINE, "--check", "--work", str(tmp_path), "--output", str(tmp_path / "results.json")]
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(line, env=settings, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode in (0, 1), done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (entry,) = results["summary"].values()
    assert done.returncode == (0 if entry["met"] else 1)
    assert entry["met"] is (results["speed_up"] >= entry["bar"])
    assert (results["about"]["threads"], results["about"]["steps"], results["about"]["samples"]) == (1, 2, 2)
    one, two = (results["rounds"][ranks] for ranks in "12")
    assert (len(one), len(two)) == (2, 2)
    assert results["speed_up"] == statistics.median(b / a for a, b in zip(one, two, strict=True))
    for ranks in "12":  # CPU time is at most the time of the round; the first round is warm-up
        for wall, own in zip(results["seconds"][ranks], results["cpu_seconds"][ranks][1:], strict=True):
            assert len(own) == int(ranks)
            assert all(0 < cpu < 1.1 * wall for cpu in own)
    losses = results["losses"]
    assert all(math.isfinite(loss) for found in losses.values() for loss in found)
    # All ranks have the same samples and dropout here, so two give the losses of one.
    assert losses["1"] == pytest.approx(losses["2"], rel=1e-4)
    assert losses["1"][-1] < losses["1"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_existing_results_and_equal_cores_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()
    core = str(min(os.sched_getaffinity(0)))
    for words, said in (
        (["--output", str(tmp_path / "results.json")], "not overwritten"),
        (["--cores", core, core], "cores are needed"),
    ):
        done = subprocess.run([*LINE, *words], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 2
        assert said in done.stderr
