"""The benchmark of a whole causal model runs, and its pages have its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import whole_step
from tests.helpers.launch import REPOSITORY
from tests.helpers.results import read_results

RESULTS = "whole_step-cpu-2026-12-01"


def test_a_quick_run(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    assert whole_step.main(["--quick", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["dtype"], row["dropout"]) for row in rows] == [(d, p) for d in ("fp32", "bf16") for p in (0.0, 0.1)]
    for row in rows:
        count = row["trained_parameters"]
        assert count["frozen"] == 0
        assert row["time_by_lora"].keys() == row["seconds"].keys() == {"frozen", "lora", "clorae"}
        assert row["seconds"]["clorae"] > row["seconds"]["frozen"] > 0


def test_a_limit_that_is_exceeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, code in ((0.0, 1), (1e9, 0)):
        monkeypatch.setattr(whole_step, "LIMITS", dict.fromkeys(whole_step.DTYPES, limit))
        line = ["--quick", "--check", "--dtypes", "fp32", "--output", str(tmp_path / f"{code}.json")]
        assert whole_step.main(line) == code


def test_a_model_is_needed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        whole_step.main(["--output", str(tmp_path / "results.json")])


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    page = (REPOSITORY / "benchmarks/README.md").read_text(encoding="utf-8")
    for row in read_results(RESULTS)["rows"]:
        times = " | ".join(f"{row['seconds'][name]:.2f}" for name in whole_step.METHODS)
        limit = f"({whole_step.LIMITS[row['dtype']]:.2f})"
        ratio = f"{row['time_by_lora']['clorae']:.3f} {limit}"
        assert f"| {row['dtype']}, dropout {row['dropout']} | {times} | {ratio} |" in page
    seconds = {(row["dtype"], row["dropout"]): row["seconds"]["clorae"] for row in read_results(RESULTS)["rows"]}
    training = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    assert f"is {seconds['fp32', 0.0] / seconds['bf16', 0.0]:.1f} times as fast" in training
