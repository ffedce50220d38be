"""The comparison of the whole job with Trainer, with tiny bases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import REPOSITORY, environment
from tests.helpers.results import read_results

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import peers


@pytest.mark.slow
def test_a_quick_run_measures_every_contender(tmp_path: Path) -> None:
    output = tmp_path / "peers.json"
    line = [sys.executable, str(REPOSITORY / "benchmarks/peers.py"), "--quick", "--check", "--output", str(output)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=REPOSITORY)
    rows = json.loads(output.read_text())["rows"]
    assert [row["base"] for row in rows] == ["causal", "t5"]
    for row in rows:
        (first,) = row["rounds"]
        assert {peers.JOB, peers.JOB_LORA, peers.TRAINER} <= set(first)
        for found in (first[peers.JOB], first[peers.TRAINER]):
            assert all(found[name] > 0 for name in ("samples_per_second", "peak_gib", "answers_per_second"))
    missed = any(not peers.is_met(name, row["ratios"][name]) for row in rows for name in peers.LIMITS)
    assert done.returncode == int(missed), done.stderr


def test_ratios_are_medians_over_rounds() -> None:
    def one(job: float) -> dict[str, dict[str, float]]:
        figures = ("samples_per_second", "peak_gib", "answers_per_second")
        return {peers.JOB: dict.fromkeys(figures, job), peers.TRAINER: dict.fromkeys(figures, 2.0)}

    found = peers.ratios([one(2), one(4), one(3)])
    assert found == dict.fromkeys(("training", "memory", "generation"), 1.5)
    assert peers.is_met("training", 1.5)
    assert not peers.is_met("memory", 1.5)
    table = peers.table([{"base": "t5", "rounds": [one(2), one(4), one(3)], "ratios": found}])
    assert "| t5 | job, C-LoRAE | 3.00 | 3.00 | 3.00 |" in table
    assert "**1.50** (1.3)" in table


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    page = (REPOSITORY / "benchmarks/README.md").read_text(encoding="utf-8")
    for line in peers.table(read_results("peers-causal-cpu-2026-12-01")["rows"]).splitlines()[2:5]:
        assert line.removeprefix("| causal ") in page
    for name, ratio in peers.ratios(read_results("peers-causal-cpu-2026-12-01")["rows"][0]["rounds"]).items():
        assert f"**{ratio:.2f}** ({peers.LIMITS[name]:g})" in page
