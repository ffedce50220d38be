"""Figure 4: what is drawn, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from lvlm_clorae.analysis.compare import Comparison, System, compare
from lvlm_clorae.analysis.radar import MOST, draw, floor_of, normalised
from lvlm_clorae.errors import UserError
from lvlm_clorae.sweep.collect import Row
from lvlm_clorae.training.config import make_config
from tests.analysis.runs import make_run

UNITS = ["a/x", "b/y", "c/z"]


def systems(*scores: list[float]) -> list[System]:
    rows = [Row(str(n), {}, {0: dict(zip(UNITS, values, strict=False))}) for n, values in enumerate(scores)]
    return [System(make_config({}), row, []) for row in rows]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *given: Any, **how: Any) -> None:
        kept.append(self)
        save(self, *given, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_scores_are_shares_of_the_best_on_each_axis() -> None:
    assert normalised(systems([50, 80, 0], [25, 100, 0]), UNITS) == [[100, 80, 0], [50, 100, 0]]


@given(st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=1, max_size=MOST))
def test_shares_lie_between_the_floor_and_100(scores: list[list[float]]) -> None:
    shares = normalised(systems(*scores), UNITS)
    floor = floor_of(shares)
    assert all(floor <= share <= 100 for row in shares for share in row)
    for axis, values in enumerate(zip(*scores, strict=True)):
        assert max(row[axis] for row in shares) == (100 if max(values) > 0 else 0)


def test_the_lines_are_the_shares(tmp_path: Path, figures: list[Figure]) -> None:
    given = systems([50, 80, 10], [25, 100, 10], [25, 100])
    told = draw(Comparison(given, UNITS, given[0]), tmp_path / "new" / "radar.png")
    assert told == ["not drawn: 2, which lacks a column"]
    (axes,) = figures[0].axes
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[100, 80, 100, 100], [50, 100, 100, 50]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "1"]
    assert [label.get_text() for label in axes.get_xticklabels()][1] == "b\ny\n100 = 100.0"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["radar.png"]


def test_a_radar_for_each_base_that_has_several_systems(tmp_path: Path, figures: list[Figure]) -> None:
    f1 = dict.fromkeys(UNITS, 50.0)
    runs = [
        make_run(tmp_path / f"{adapter}{size}", f1, adapter=adapter, model=f"flan-t5-{size}")
        for adapter in ("lora", "clorae")
        for size in ("base", "large")
    ]
    draw(compare(runs), tmp_path / "four.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["flan-t5-base", "flan-t5-large"]
    for axes in figures[0].axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["LoRA", "C-LoRAE"]
    draw(compare(runs[:3]), tmp_path / "three.png")
    assert len(figures[1].axes) == 1, "a radar of one system says nothing"
    assert len(figures[1].axes[0].get_lines()) == 3


def test_nothing_is_cut_off_or_covered(tmp_path: Path, figures: list[Figure]) -> None:
    """Labels, legend and edges keep apart with as many systems as there may be, long names and a dollar sign."""
    given = systems(*([float(n), 50.0, 60.0] for n in range(1, MOST + 1)))
    units = [f"a_dataset_with_a_name/{subtask}" for subtask in ("entity", "relation", "argument", "trigger")]
    for number, system in enumerate(given):
        system.row.group = f"C-LoRAE, template=$x_{number}{'y' * 100}"
        system.row.scores = {0: dict.fromkeys(units, 10.0 + number)}
    draw(Comparison(given, units, given[0]), tmp_path / "radar.png")
    with Image.open(tmp_path / "radar.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (edge == 255).all()
    (axes,) = figures[0].axes
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert not any(box.overlaps(axes.get_legend().get_window_extent()) for box in boxes)


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "radar.png"
    two = systems([1, 2, 3], [1, 2, 3])
    with pytest.raises(UserError, match="needs three columns, but there are 2"):
        draw(Comparison(two, UNITS[:2], two[0]), path)
    many = systems(*[[1, 2, 3]] * (MOST + 1))
    with pytest.raises(UserError, match=f"{MOST + 1} systems cannot be told apart"):
        draw(Comparison(many, UNITS, many[0]), path)
    part = systems([1, 2])
    with pytest.raises(UserError, match="no run has scores of all columns"):
        draw(Comparison(part, UNITS, part[0]), path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        draw(Comparison(two, UNITS, two[0]), tmp_path / "file" / "radar.png")
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not overwritten"):
        draw(Comparison(two, UNITS, two[0]), path)
