"""Plots of progress and gradient conflict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lvlm_clorae.training.plots import CONFLICTS, PROGRESS, mean_matrix, plot_conflicts, plot_progress

TRAIN = {"step": 1, "kind": "train", "loss": 3.0}


def dev(epoch: int, weights: tuple[float, float], *f1: float) -> dict[str, Any]:
    dataset_tasks = ("a/x", "b/y", "c/z")  # the last is not trained
    scores, trained = dict(zip(dataset_tasks, f1, strict=True)), dict(zip(dataset_tasks, weights, strict=False))
    return {"step": 4 * epoch, "kind": "dev", "epoch": epoch, "f1": scores, "weights": trained}


def conflicts(step: int, between: float | None, matrix: list[list[float | None]]) -> dict[str, Any]:
    dataset_tasks = [f"set{number}/entity" for number in range(len(matrix))]
    values = {"between": between, "within": 0.5, "negative": 0.25, "dataset_tasks": dataset_tasks, "matrix": matrix}
    return {"step": step, "kind": "conflicts", **values}


DEV = [dev(1, (1.2, 0.8), 10, 100, 0), dev(2, (1.1, 0.9), 40, 50, 3)]
MEASURED = [conflicts(0, 0.1, [[0.5, 0.1], [0.1, None]]), conflicts(20, None, [[0.7, None], [None, None]])]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (saved.append(self), save(self, *args, **how)))
    return saved


def write(run: Path, *records: dict[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def curves(axes: Any) -> dict[str, list[float]]:
    return {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}


def test_progress_shows_f1_and_weights_of_every_epoch(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path, TRAIN, *DEV)
    plot_progress(tmp_path)
    assert Image.open(tmp_path / PROGRESS).size[0] > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", PROGRESS]
    scores, weights = figures[0].axes
    assert curves(scores) == {"a/x": [10, 40], "b/y": [100, 50], "c/z": [0, 3], "mean (All / datasets)": [110 / 3, 31]}
    assert [list(line.get_ydata()) for line in weights.get_lines()[:2]] == [[1.2, 1.1], [0.8, 0.9]]


@pytest.mark.parametrize("epochs", [1, 2])
def test_progress_ends_at_the_last_epoch_and_is_not_clipped(epochs: int, tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path, *DEV[:epochs])
    plot_progress(tmp_path)
    for axes in figures[0].axes:
        assert axes.get_xlim()[1] == epochs
        assert all(max(line.get_xdata()) <= epochs for line in axes.get_lines())
    scores = figures[0].axes[0]
    assert scores.get_ylim() == (0, 100), "all-zero scores start at 0"
    assert not any(line.get_clip_on() for line in scores.get_lines()), "0 and 100 are not clipped"


def test_conflicts_show_every_measurement_and_the_mean_matrix(tmp_path: Path, figures: list[Figure]) -> None:
    write(tmp_path, TRAIN, *MEASURED)
    plot_conflicts(tmp_path)
    assert Image.open(tmp_path / CONFLICTS).size[0] > 400
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFLICTS, "metrics.jsonl"]
    over_steps, matrix = figures[0].axes[:2]
    drawn = curves(over_steps)
    assert drawn["within a dataset"] == [0.5, 0.5]
    assert drawn["between datasets"][0] == 0.1
    assert np.isnan(drawn["between datasets"][1])
    assert [text.get_text() for text in matrix.texts] == ["0.60", "0.10", "0.10", ""]
    assert [label.get_text() for label in matrix.get_yticklabels()] == ["set0/entity", "set1/entity"]


def test_the_mean_matrix_ignores_undefined_values() -> None:
    assert np.allclose(mean_matrix(MEASURED), [[0.6, 0.1], [0.1, np.nan]], equal_nan=True)


def test_conflicts_of_a_single_dataset_are_plotted(tmp_path: Path) -> None:
    write(tmp_path, conflicts(0, None, [[0.5]]) | {"negative": None})
    plot_conflicts(tmp_path)
    assert (tmp_path / CONFLICTS).exists()


@pytest.mark.parametrize(("plot", "name"), [(plot_progress, PROGRESS), (plot_conflicts, CONFLICTS)])
def test_no_records_give_no_plot(plot: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path, TRAIN)
    plot(tmp_path)
    assert not (tmp_path / name).exists()
