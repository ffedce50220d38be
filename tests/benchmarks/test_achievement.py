"""The benchmark of the achievement loss reads finished runs and pairs differences by seed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import achievement


def finish(work: Path, variant: str, seed: int, first: float, second: float) -> None:
    run = work / f"{variant}-{seed}"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "schema.json").touch()
    dataset_tasks = {"a/entity": {"f1": first}, "b/relation": {"f1": second}}
    (run / "scores.json").write_text(json.dumps({"all": first + second, "dataset_tasks": dataset_tasks}))


def test_finished_runs_are_paired_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(achievement.subprocess, "run", lambda *args, **how: pytest.fail("the run is finished"))
    for seed in (0, 1):
        finish(tmp_path, "none", seed, 50 + 10 * seed, 80)
        finish(tmp_path, "softmax", seed, 52 + 10 * seed, 80)
        finish(tmp_path, "sum", seed, 51 + 14 * seed, 78)
    output = tmp_path / "out.json"
    line = ["--work", str(tmp_path), "--seeds", "2", "--output", str(output)]
    # The description of the machine runs git, also a subprocess.
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


@pytest.mark.integration
def test_a_failed_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--work", str(tmp_path), "--seeds", "1", "--jobs", "1", "--output", str(tmp_path / "o"), "--lora_rank", "0"]
    assert achievement.main(line) == 1
    assert "rank = 0" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
