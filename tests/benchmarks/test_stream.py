"""The benchmark of the data loader runs, and the loader reads every byte once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import REPOSITORY
from tests.helpers.results import read_results


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    line = [sys.executable, str(REPOSITORY / "benchmarks/stream.py"), "--quick", "--check"]
    line += ["--output", str(tmp_path / "results.json")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    results = json.loads((tmp_path / "results.json").read_text())
    summary = results["summary"]
    assert done.returncode == (0 if all(entry["met"] for entry in summary.values()) else 1), done.stderr
    assert len(summary) == 6
    assert {name: share for name, share in results["reading"].items() if "ranks" in name} == {
        f"{how}, {ranks} ranks": 1.0 for how in ("local", "http") for ranks in (1, 2, 4)
    }
    for name in ("shards", "samples"):
        assert summary[f"memory at ten times the {name}"]["median"] < 1.05
    again = subprocess.run(line, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "not overwritten" in again.stderr


def test_the_figures_of_the_page_are_those_of_the_results() -> None:
    page = (REPOSITORY / "benchmarks/README.md").read_text(encoding="utf-8")
    content = read_results("stream-cpu-2026-11-29")
    digits = {
        "time by reading, decoding and resizing alone": 3,
        "time by webdataset's plain pipeline": 3,
        "first batch on resume by cold start": 2,
        "bytes read by bytes of the shards": 3,
    }
    for name, places in digits.items():
        assert f" | {content['summary'][name]['median']:.{places}f} | " in page
    assert all(entry["met"] for entry in content["summary"].values())
    assert f"{content['throughput']['samples_per_second']['loader']:.0f} samples per second" in page
