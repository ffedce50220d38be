"""The radar of systems: its contents, refused input, and that nothing is cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from lvlm_clorae.analysis.compare import Row, RunTable, compare
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.figures import texts
from tests.helpers.runs import make_run
from tools.radar import MAX_SYSTEMS, normalized, plot_radar, radar_floor

DATASET_TASKS = ["a/x", "b/y", "c/z"]
DEMO = make_config({})


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
