"""The operations of adapted layers, which a GPU launches as kernels, do not creep up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import REPOSITORY
from tests.helpers.results import read_results

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import launches

MOST = {
    "clorae": (54, 42, 6, 7),
    "lora": (18, 14, 5, 5),
    "moslora": (20, 16, 5, 5),
    "loramoe": (36, 32, 8, 8),
    "mtllora": (29, 25, 8, 11),
    "hydralora": (30, 26, 8, 8),
}
"""Operations per layer, rounded up, for dropout 0.1, dropout 0, decoding, and decoding with a task per row."""


@pytest.mark.integration
@pytest.mark.parametrize("method", MOST)
def test_operations_do_not_creep_up(method: str) -> None:
    found = launches.measure(method)
    counts = [found[name] for name in launches.LIMITS]
    assert [count <= most for count, most in zip(counts, MOST[method], strict=True)] == [True] * 4, counts
    if method == "clorae":
        assert all(found[name] <= limit for name, limit in launches.LIMITS.items())


def test_views_and_allocations_are_not_counted() -> None:
    x = torch.ones(4, 6)
    with launches.Launches() as counted:
        x.new_empty(3)
        (x.view(6, 4).T[1:].detach() + 1).sum()
    assert {name: count for name, count in counted.counts.items() if count} == {"aten::add": 1, "aten::sum": 1}


@pytest.mark.integration
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "measure", lambda method: dict.fromkeys(launches.LIMITS, 9.0))
    assert launches.main(["--check", "--output", str(tmp_path / "out.json")]) == 1
    assert "exceeded: decoding;" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["per_layer"]["clorae"]["decoding"] == 9
    assert launches.main(["--output", str(tmp_path / "more.json")]) == 0


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    page = (REPOSITORY / "benchmarks/README.md").read_text(encoding="utf-8")
    for method, counts in read_results("launches-2026-12-01")["per_layer"].items():
        assert f"| {method} | {' | '.join(f'{count:.1f}' for count in counts.values())} |" in page
