"""Learning curves of a results file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.helpers.launch import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import curves

CURVE = [
    {"step": 1, "dataset_task": "a/entity", "ce": 4.0, "epoch": 0},
    {"step": 2, "dataset_task": "b/relation", "ce": 3.0, "epoch": 0},
    {"step": 3, "dataset_task": "a/entity", "ce": 2.0, "epoch": 0},
    {"step": 3, "epoch": 1, "f1": {"a/entity": 50.0, "b/relation": 25.0}},
]


def write(path: Path, curve: list[dict]) -> Path:
    run = {"run": {"system": "x", "seed": 0}, "result": {"curve": curve}}
    path.write_text(json.dumps({"runs": [run, {"run": {"system": "y"}, "result": {"curve": CURVE}}]}))
    return path


def test_points_are_those_of_the_log() -> None:
    assert curves.losses(CURVE) == {"a/entity": [(1, 4.0), (3, 2.0)], "b/relation": [(2, 3.0)]}
    assert curves.scores(CURVE) == {"a/entity": [(3, 50.0)], "b/relation": [(3, 25.0)]}
    assert curves.running_mean([4.0, 2.0, 6.0], 2) == [4.0, 3.0, 4.0]


def test_every_dataset_task_has_a_panel_with_its_curves(tmp_path: Path, figures: list[Figure]) -> None:
    output = tmp_path / "curves.png"
    assert curves.main([str(write(tmp_path / "r.json", CURVE)), "--system", "x", "--output", str(output)]) == 0
    assert output.is_file()
    panels = {axes.get_title(): axes for axes in figures[0].axes if axes.get_title()}
    assert set(panels) == {"a/entity", "b/relation"}
    points, mean = panels["a/entity"].lines
    assert (list(points.get_ydata()), list(mean.get_ydata())) == ([4.0, 2.0], [4.0, 3.0])


def test_a_system_without_a_curve_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        curves.main([str(write(tmp_path / "r.json", [])), "--system", "x", "--output", str(tmp_path / "c.png")])
