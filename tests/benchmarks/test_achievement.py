"""The comparison of achievement weights: runs that have ended are read, not done again; differences are paired."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import achievement


def finished(work: Path, way: str, seed: int, first: float, second: float) -> None:
    run = work / f"{way}-{seed}"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "schema.json").touch()
    units = {"a/entity": {"f1": first}, "b/relation": {"f1": second}}
    (run / "scores.json").write_text(json.dumps({"all": first + second, "units": units}))


def test_ended_runs_are_paired_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(achievement.subprocess, "run", lambda *args, **how: pytest.fail("it has ended"))
    for seed in (0, 1):
        finished(tmp_path, "none", seed, 50 + 10 * seed, 80)
        finished(tmp_path, "softmax", seed, 52 + 10 * seed, 80)
        finished(tmp_path, "sum", seed, 51 + 14 * seed, 78)
    output = tmp_path / "out.json"
    line = ["--work", str(tmp_path), "--seeds", "2", "--output", str(output)]
    # Its description of the machine asks git, which is a subprocess too.
    monkeypatch.setattr(achievement, "description", lambda device: {"date": "today"})
    assert achievement.main(line) == 0
    summary = json.loads(output.read_text())["summary"]
    assert summary["All"]["softmax"]["pairs"] == [2, 2]
    assert summary["All"]["softmax"]["standard_error"] == 0
    assert summary["worst dataset"]["sum"]["pairs"] == [1, 5]
    assert summary["worst dataset"]["sum"]["difference"] == 3
    assert summary["worst dataset"]["sum"]["standard_error"] == pytest.approx(2)
    assert summary["b/relation"]["sum"]["difference"] == -2
    assert "| worst dataset | 55.0 | 57.0, +2.0 ± 0.0 | 58.0, +3.0 ± 2.0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        achievement.main(line)


def test_a_run_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--work", str(tmp_path), "--seeds", "1", "--jobs", "1", "--output", str(tmp_path / "o"), "--rank", "0"]
    assert achievement.main(line) == 1
    assert "rank = 0 is out of range" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
