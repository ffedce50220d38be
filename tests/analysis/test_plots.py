"""Plots of tables: their contents, refused input, and that nothing is cut off."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lvlm_clorae.analysis.compare import Row, RunTable
from lvlm_clorae.analysis.plots import (
    MAX_LINES,
    MAX_PANELS,
    dataset_task_panels,
    lines,
    ordered,
    plot_dataset_tasks,
    plot_sweep,
)
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.figures import texts

DATASET_TASKS = ["a/x", "b/y", "c/z"]
DEMO = make_config({})


def swept(**values: list[Any]) -> RunTable:
    """Every combination of the values, with the scores 0, 1, 2, ... and no deviation."""
    rows = [Row("", DEMO, dict(zip(values, of, strict=True)), {}, []) for of in product(*values.values())]
    for number, row in enumerate(rows):
        row.scores = {0: {"All": float(number)}}
    return RunTable(rows, [], keys=list(values))


def test_values_are_ordered() -> None:
    assert ordered([64, 128, None, 32, 64]) == [None, 32, 64, 128]
    assert ordered(["lora", "clorae", "lora"]) == ["lora", "clorae"]
    assert ordered([True, False]) == [True, False]
    assert ordered([["b"], [], ["b"]]) == [["b"], []]


def test_lines_are_combinations_of_the_other_settings() -> None:
    table = swept(lora_rank=[8, 16], adapter=["clorae", "lora"], ema=[None])
    assert [(label, [row.settings["lora_rank"] for row in rows]) for label, rows in lines(table, "lora_rank")] == [
        ("adapter=clorae, ema=none", [8, 16]),
        ("adapter=lora, ema=none", [8, 16]),
    ]
    long = swept(lora_rank=[8], template=["x" * 50 + "1", "x" * 50 + "2"])
    assert len(lines(long, "lora_rank")) == 2, "labels that are cut alike stay two lines"


def pixels_of(table: RunTable, path: Path) -> np.ndarray[Any, Any]:
    plot_sweep(table, path)
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.mark.integration
def test_sweeps_of_one_to_three_settings_are_drawn(tmp_path: Path) -> None:
    """Panels are in two columns; unusual texts do no harm."""
    one = pixels_of(swept(lora_rank=[8, 16, 32]), tmp_path / "one.png")
    two = pixels_of(swept(lora_rank=[8, 16, 32], use_gate=[True, False]), tmp_path / "two.png")
    three = pixels_of(
        swept(lora_rank=[8], ema=[None, 0.9], template=["{image}\n$x$ _^", "y" * 99]), tmp_path / "three.png"
    )
    many = pixels_of(swept(gamma=[1.0, 2.0], beta=[0.0, 0.1, 0.2], lora_rank=[1, 2, 4, 8]), tmp_path / "many.png")
    assert two.shape[1] == 2 * one.shape[1]
    assert three.shape[0] == many.shape[0] == 2 * one.shape[0]
    for pixels in (one, two, three, many):
        assert (pixels != 255).any(axis=2).mean() > 0.01


def test_many_lines_are_drawn_as_their_mean(tmp_path: Path, figures: list[Figure]) -> None:
    plot_sweep(swept(gamma=[1.0, 2.0], lora_rank=list(range(1, MAX_LINES + 2))), tmp_path / "plot.png")
    gamma, rank = figures[0].axes
    assert texts(rank.get_legend().get_texts()) == ["gamma=1.0", "gamma=2.0"]
    assert texts(gamma.get_legend().get_texts()) == [f"mean of {MAX_LINES + 1} lines"]
    [mean] = [line for line in gamma.lines if line.get_color() == "black"]
    assert list(mean.get_ydata()) == [4.0, 13.0]


def test_axes_of_zeros_start_at_zero(tmp_path: Path, figures: list[Figure]) -> None:
    table = swept(lora_rank=[8, 16])
    for row in table.rows:
        row.scores = {0: {"All": 0.0, "a/x": 0.0}}
    table.dataset_tasks = ["a/x"]
    plot_sweep(table, tmp_path / "all.png")
    assert plot_dataset_tasks(table, tmp_path / "dataset_tasks.png")
    for figure in figures:
        low, high = figure.axes[0].get_ylim()
        assert low == 0 < high


def test_a_row_without_all_is_not_drawn_as_zero(tmp_path: Path, figures: list[Figure]) -> None:
    table = swept(lora_rank=[8, 16, 32])
    table.rows[1].scores = {0: {"a/x": 5.0}}
    plot_sweep(table, tmp_path / "plot.png")
    assert list(figures[0].axes[0].containers[0].lines[0].get_ydata()) == [0.0, 2.0]


def one_at_a_time() -> RunTable:
    """Two bases, with the rank varied at one dropout and dropout at one rank, as in Figure 5 of the paper."""
    runs = [("base", rank, 0.1) for rank in (128, 16, 64)] + [("base", 128, dropout) for dropout in (0.0, 0.8)]
    runs += [("large", rank, 0.1) for rank in (64, 16)] + [("large", 64, dropout) for dropout in (0.0, 0.2, 0.4, 0.8)]
    keys = ["model", "lora_rank", "lora_dropout"]
    rows = [Row("", DEMO, dict(zip(keys, run, strict=True)), {}, []) for run in runs]
    for row in rows:
        rank = float(row.settings["lora_rank"])
        row.scores = {0: {"All": rank + 1, "a/x": rank, "b/y": 1.0}, 1: {"All": rank + 3, "a/x": rank + 2, "b/y": 1.0}}
    return RunTable(rows, ["a/x", "b/y"], keys=keys)


def test_each_base_and_setting_has_a_panel_of_dataset_tasks(tmp_path: Path, figures: list[Figure]) -> None:
    table = one_at_a_time()
    assert plot_dataset_tasks(table, tmp_path / "dataset_tasks.png")
    panels = figures[0].axes
    assert [(axes.get_xlabel(), axes.get_title()) for axes in panels] == [
        ("lora_rank", "model=base, lora_dropout=0.1"),
        ("lora_rank", "model=large, lora_dropout=0.1"),
        ("lora_dropout", "model=base, lora_rank=128"),
        ("lora_dropout", "model=large, lora_rank=64"),
    ]
    assert texts(panels[0].get_xticklabels()) == ["16", "64", "128"]
    first, second = (container.lines[0] for container in panels[0].containers)
    assert (list(first.get_ydata()), list(second.get_ydata())) == ([17, 65, 129], [1, 1, 1])
    assert texts(figures[0].legends[0].get_texts()) == ["a/x", "b/y"]
    plot_sweep(table, tmp_path / "all.png")
    assert texts(figures[1].axes[1].get_legend().get_texts())[:1] == ["model=base, lora_dropout=0.1"]


def test_single_runs_do_not_displace_the_lines(tmp_path: Path, figures: list[Figure]) -> None:
    table = one_at_a_time()
    for n in range(9):
        settings = {"model": "base", "lora_rank": 128, "lora_dropout": 0.3 + n / 100}
        table.rows.append(Row("", DEMO, settings, {0: {"All": 1.0}}, []))
    plot_sweep(table, tmp_path / "all.png")
    assert texts(figures[0].axes[1].get_legend().get_texts()) == [
        "model=base, lora_dropout=0.1",
        "model=large, lora_dropout=0.1",
    ]


def test_settings_that_are_not_numbers_have_no_panel_of_dataset_tasks(tmp_path: Path) -> None:
    for table in (
        swept(adapter=["lora", "clorae"], use_gate=[True, False]),
        swept(ema=[None, 0.9]),
        swept(lora_rank=[8]),
    ):
        assert not plot_dataset_tasks(table, tmp_path / "dataset_tasks.png")
    assert not (tmp_path / "dataset_tasks.png").exists()


def test_panels_of_dataset_tasks_are_bounded() -> None:
    panels = dataset_task_panels(swept(lora_rank=[8, 16, 32], gamma=[float(n) for n in range(1, 20)]))
    assert len(panels) == MAX_PANELS
    assert [key for key, _, rows in panels if len(rows) == 19] == ["gamma"] * 3, "those with the most values are kept"
