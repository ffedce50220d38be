"""The plots of a sweep: every point in its panel, and no panel without end."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvlm_clorae.sweep.collect import Collected, Row
from lvlm_clorae.sweep.plot import MOST_LINES, MOST_PANELS, lines, ordered, plot, plot_units, unit_panels


def made(**values: list[Any]) -> Collected:
    """Every combination of the values, with the scores 0, 1, 2, ... and no deviation."""
    rows = [Row("", dict(zip(values, of, strict=True))) for of in product(*values.values())]
    for number, row in enumerate(rows):
        row.scores = {0: {"All": float(number)}}
    return Collected(list(values), ["All"], rows, [], [])


def test_values_are_in_order() -> None:
    assert ordered([64, 128, None, 32, 64]) == [None, 32, 64, 128]
    assert ordered(["lora", "clorae", "lora"]) == ["lora", "clorae"]
    assert ordered([True, False]) == [True, False]
    assert ordered([["b"], [], ["b"]]) == [["b"], []]


def test_lines_are_the_other_settings() -> None:
    found = made(rank=[8, 16], adapter=["clorae", "lora"], ema=[None])
    assert [(label, [row.settings["rank"] for row in rows]) for label, rows in lines(found, "rank")] == [
        ("adapter=clorae, ema=none", [8, 16]),
        ("adapter=lora, ema=none", [8, 16]),
    ]
    long = made(rank=[8], template=["x" * 50 + "1", "x" * 50 + "2"])
    assert len(lines(long, "rank")) == 2, "texts that are cut alike stay two lines"


def drawn(found: Collected, path: Path) -> np.ndarray[Any, Any]:
    plot(found, path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_plots_of_all_kinds(tmp_path: Path) -> None:
    """Panels side by side up to two, then below; strange texts are no fault."""
    one = drawn(made(rank=[8, 16, 32]), tmp_path / "one.png")
    two = drawn(made(rank=[8, 16, 32], use_gate=[True, False]), tmp_path / "two.png")
    three = drawn(made(rank=[8], ema=[None, 0.9], template=["{image}\n$x$ _^", "y" * 99]), tmp_path / "three.png")
    many = drawn(made(gamma=[1.0, 2.0], beta=[0.0, 0.1, 0.2], rank=[1, 2, 4, 8]), tmp_path / "many.png")
    assert two.shape[1] == 2 * one.shape[1]
    assert three.shape[0] == many.shape[0] == 2 * one.shape[0]
    for picture in (one, two, three, many):
        assert (picture != 255).any(axis=2).mean() > 0.01


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    kept: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **how: (kept.append(self), save(self, *given, **how)))
    return kept


def test_many_lines_become_their_mean(tmp_path: Path, kept: list[Any]) -> None:
    plot(made(gamma=[1.0, 2.0], rank=list(range(1, MOST_LINES + 2))), tmp_path / "plot.png")
    gamma, rank = kept[0].axes
    assert [text.get_text() for text in rank.get_legend().get_texts()] == ["gamma=1.0", "gamma=2.0"]
    assert [text.get_text() for text in gamma.get_legend().get_texts()] == [f"mean of {MOST_LINES + 1} lines"]
    [mean] = [line for line in gamma.lines if line.get_color() == "black"]
    assert list(mean.get_ydata()) == [4.0, 13.0]


def one_at_a_time() -> Collected:
    """Two bases, the rank varied at one dropout and dropout at one rank, as in Figure 5 of the paper."""
    points = [("base", rank, 0.1) for rank in (128, 16, 64)] + [("base", 128, dropout) for dropout in (0.0, 0.8)]
    points += [("large", rank, 0.1) for rank in (64, 16)] + [("large", 64, dropout) for dropout in (0.0, 0.2, 0.4, 0.8)]
    rows = [Row("", {"model": model, "rank": rank, "dropout": dropout}) for model, rank, dropout in points]
    for row in rows:
        rank = float(row.settings["rank"])
        row.scores = {0: {"All": rank + 1, "a/x": rank, "b/y": 1.0}, 1: {"All": rank + 3, "a/x": rank + 2, "b/y": 1.0}}
    return Collected(["model", "rank", "dropout"], ["All", "a/x", "b/y"], rows, [], [])


def test_a_panel_of_units_for_each_base_and_setting(tmp_path: Path, kept: list[Any]) -> None:
    found = one_at_a_time()
    assert plot_units(found, tmp_path / "units.png")
    panels = kept[0].axes
    assert [(axes.get_xlabel(), axes.get_title()) for axes in panels] == [
        ("rank", "model=base, dropout=0.1"),
        ("rank", "model=large, dropout=0.1"),
        ("dropout", "model=base, rank=128"),
        ("dropout", "model=large, rank=64"),
    ]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["16", "64", "128"]
    first, second = (container.lines[0] for container in panels[0].containers)
    assert (list(first.get_ydata()), list(second.get_ydata())) == ([17, 65, 129], [1, 1, 1])
    assert [text.get_text() for text in kept[0].legends[0].get_texts()] == ["a/x", "b/y"]
    plot(found, tmp_path / "all.png")
    rank = kept[1].axes[1]
    assert [text.get_text() for text in rank.get_legend().get_texts()][:1] == ["model=base, dropout=0.1"]


def test_points_of_other_settings_do_not_crowd_out_the_lines(tmp_path: Path, kept: list[Any]) -> None:
    found = one_at_a_time()
    extra = [Row("", {"model": "base", "rank": 128, "dropout": 0.3 + n / 100}, {0: {"All": 1.0}}) for n in range(9)]
    plot(Collected(found.keys, found.names, [*found.rows, *extra], [], []), tmp_path / "all.png")
    texts = [text.get_text() for text in kept[0].axes[1].get_legend().get_texts()]
    assert texts == ["model=base, dropout=0.1", "model=large, dropout=0.1"]


def test_settings_that_are_no_numbers_have_no_panel_of_units(tmp_path: Path) -> None:
    for found in (made(adapter=["lora", "clorae"], use_gate=[True, False]), made(ema=[None, 0.9]), made(rank=[8])):
        assert not plot_units(found, tmp_path / "units.png")
    assert not (tmp_path / "units.png").exists()


def test_panels_of_units_are_bounded() -> None:
    panels = unit_panels(made(rank=[8, 16, 32], gamma=[float(n) for n in range(1, 20)]))
    assert len(panels) == MOST_PANELS
    assert [key for key, _, rows in panels if len(rows) == 19] == ["gamma"] * 3, "those with the most values first"
