"""Plots of tables: their contents, refused input, and that nothing is cut off."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from lvlm_clorae.analysis.compare import Row, RunTable, compare
from lvlm_clorae.analysis.plots import (
    MAX_LINES,
    MAX_PANELS,
    MAX_SYSTEMS,
    dataset_task_panels,
    lines,
    normalized,
    ordered,
    plot_dataset_tasks,
    plot_radar,
    plot_sweep,
    radar_floor,
)
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.runs import make_run

DATASET_TASKS = ["a/x", "b/y", "c/z"]
DEMO = make_config({})


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *given: Any, **how: Any) -> None:
        kept.append(self)
        save(self, *given, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def texts(items: Any) -> list[str]:
    return [item.get_text() for item in items]


def systems(*scores: list[float]) -> RunTable:
    """A table with a row for each list of scores."""
    rows = [
        Row(str(n), DEMO, {}, {0: dict(zip(DATASET_TASKS, values, strict=False))}, [])
        for n, values in enumerate(scores)
    ]
    return RunTable(rows, DATASET_TASKS, rows[0])


def test_scores_are_shares_of_the_best_on_each_axis() -> None:
    assert normalized(systems([50, 80, 0], [25, 100, 0]).rows, DATASET_TASKS) == [[100, 80, 0], [50, 100, 0]]


@given(st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=1, max_size=MAX_SYSTEMS))
def test_shares_are_between_the_floor_and_100(scores: list[list[float]]) -> None:
    shares = normalized(systems(*scores).rows, DATASET_TASKS)
    floor = radar_floor(shares)
    assert all(floor <= share <= 100 for row in shares for share in row)
    for axis, values in enumerate(zip(*scores, strict=True)):
        assert max(row[axis] for row in shares) == (100 if max(values) > 0 else 0)


def test_the_radar_draws_complete_rows_and_names_the_best(tmp_path: Path, figures: list[Figure]) -> None:
    notes = plot_radar(systems([50, 88.9, 10], [25, 80, 10], [25, 100]), tmp_path / "new" / "radar.png")
    assert len(notes) == 1
    (axes,) = figures[0].axes
    first, second = (list(line.get_ydata()) for line in axes.get_lines())
    assert first == [100, 100, 100, 100]
    assert second == pytest.approx([50, 100 * 80 / 88.9, 100, 50])
    assert texts(axes.get_legend().get_texts()) == ["0", "1"]
    assert texts(axes.get_xticklabels())[1] == "b\ny\nbest 88.9"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["radar.png"]


def test_a_radar_of_zeros_starts_at_zero(tmp_path: Path, figures: list[Figure]) -> None:
    plot_radar(systems([0, 0, 0], [0, 0, 0]), tmp_path / "radar.png")
    (axes,) = figures[0].axes
    assert axes.get_ylim()[0] == 0
    assert texts(axes.get_xticklabels())[0] == "a\nx\nbest 0.0"


def test_each_base_with_several_systems_has_a_radar(tmp_path: Path, figures: list[Figure]) -> None:
    f1 = dict.fromkeys(DATASET_TASKS, 50.0)
    runs = [
        make_run(tmp_path / f"{adapter}{size}", f1, adapter=adapter, model=f"flan-t5-{size}")
        for adapter in ("lora", "clorae")
        for size in ("base", "large")
    ]
    plot_radar(compare(runs), tmp_path / "four.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["flan-t5-base", "flan-t5-large"]
    for axes in figures[0].axes:
        assert texts(axes.get_legend().get_texts()) == ["LoRA", "C-LoRAE"]
    plot_radar(compare(runs[:3]), tmp_path / "three.png")
    assert len(figures[1].axes) == 1, "a radar of one system shows nothing"
    assert len(figures[1].axes[0].get_lines()) == 3


def test_no_label_of_a_radar_is_cut_off_or_covered(tmp_path: Path, figures: list[Figure]) -> None:
    """With as many systems as possible, long names and a dollar sign."""
    table = systems(*([float(n), 50.0, 60.0] for n in range(1, MAX_SYSTEMS + 1)))
    table.dataset_tasks = [
        f"a_dataset_with_a_name/{subtask}" for subtask in ("entity", "relation", "argument", "trigger")
    ]
    for number, row in enumerate(table.rows):
        row.name = f"C-LoRAE, template=$x_{number}{'y' * 100}"
        row.scores = {0: dict.fromkeys(table.dataset_tasks, 10.0 + number)}
    plot_radar(table, tmp_path / "radar.png")
    with Image.open(tmp_path / "radar.png") as opened:
        pixels = np.asarray(opened.convert("RGB"))
    for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (edge == 255).all()
    (axes,) = figures[0].axes
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert not any(box.overlaps(axes.get_legend().get_window_extent()) for box in boxes)


def test_radars_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "radar.png"
    two = systems([1, 2, 3], [1, 2, 3])
    with pytest.raises(UserError, match="three dataset tasks"):
        plot_radar(RunTable(two.rows, DATASET_TASKS[:2], two.rows[0]), path)
    with pytest.raises(UserError, match=f"{MAX_SYSTEMS + 1} systems"):
        plot_radar(systems(*[[1.0, 2.0, 3.0]] * (MAX_SYSTEMS + 1)), path)
    with pytest.raises(UserError, match="--dataset_tasks"):
        plot_radar(systems([1, 2]), path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        plot_radar(two, tmp_path / "file" / "radar.png")
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not overwritten"):
        plot_radar(two, path)


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
