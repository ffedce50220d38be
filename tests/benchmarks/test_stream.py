"""The benchmark of the data loader runs, and the loader reads every byte once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import REPOSITORY


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
