"""The table of a sweep: means over seeds, and nothing silently left out."""

from __future__ import annotations

import csv
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lvlm_clorae.sweep.collect import Collected, Row, collect, read_scores, spelt, write
from lvlm_clorae.sweep.plot import MOST_LINES, lines, ordered, plot
from lvlm_clorae.sweep.points import Sweep
from lvlm_clorae.sweep.standing import standings
from tests.sweep.helpers import begin, finish, sweep_of


def collected(sweep: Sweep) -> Collected:
    return collect(sweep, standings(sweep.points))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Two ranks and plain LoRA, three seeds; one run failed, one has damaged scores, one waits."""
    sweep = sweep_of(
        tmp_path,
        settings={"model": "owner/name"},
        grid={"rank": [8, 16]},
        points=[{"adapter": "lora"}],
        seeds=[0, 1, 2],
    )
    for number, (entity, relation) in enumerate([(50, 21), (60, 25), (55, 23), (70, 30), (72, 30)]):
        finish(sweep.points[number], a_entity=float(entity), b_relation=float(relation))
    begin(sweep.points[5], state="failed", message="out of memory")
    finish(sweep.points[6], a_entity=40.0, b_relation=10.0)
    (finish(sweep.points[7], a_entity=40.0) / "scores.json").write_text('{"all": 3')
    return sweep


def test_mean_and_deviation_over_seeds(sweep: Sweep) -> None:
    found = collected(sweep)
    assert found.keys == ["adapter", "rank"]
    assert found.names == ["All", "a/entity", "b/relation"]
    assert [row.settings for row in found.rows] == [
        {"adapter": "clorae", "rank": 8},
        {"adapter": "clorae", "rank": 16},
        {"adapter": "lora", "rank": 64},
    ]
    assert [list(row.scores) for row in found.rows] == [[0, 1, 2], [0, 1], [0]]
    first = found.rows[0]
    assert (first.mean("All"), first.sd("All")) == (78, 7)
    assert (first.mean("a/entity"), first.sd("a/entity")) == (55, 5)
    assert (found.rows[2].mean("All"), found.rows[2].sd("All")) == (50, None)


def test_what_is_not_in_the_table_is_told(sweep: Sweep) -> None:
    found = collected(sweep)
    assert found.unfinished == [(5, "rank=16,seed=2", "failed"), (8, "adapter=lora,seed=2", "waiting")]
    assert len(found.problems) == 1
    assert "adapter=lora,seed=1/scores.json: is damaged" in found.problems[0]


def test_what_is_written(sweep: Sweep, tmp_path: Path) -> None:
    found = collected(sweep)
    paths = write(sweep, found)
    assert paths == [tmp_path / "runs" / name for name in ("sweep.csv", "sweep.json", "sweep.png")]
    with open(paths[0], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["point"] == "rank=8"
    assert (rows[0]["adapter"], rows[0]["rank"], rows[0]["seeds"]) == ("clorae", "8", "3")
    assert (float(rows[0]["All_mean"]), float(rows[0]["All_sd"]), rows[2]["All_sd"]) == (78, 7, "")
    content = json.loads(paths[1].read_text(encoding="utf-8"))
    assert content["rows"][1]["settings"] == {"adapter": "clorae", "rank": 16}
    assert content["rows"][1]["scores"]["a/entity"] == {
        "mean": 71,
        "sd": statistics.stdev([70, 72]),
        "values": [70, 72],
    }
    assert [entry["number"] for entry in content["unfinished"]] == [5, 8]
    assert len(content["problems"]) == 1
    assert not list((tmp_path / "runs").glob(".*")), "nothing half-written is left"
    write(sweep, found)


def test_rows_are_by_what_points_have_not_by_how_they_are_written(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, points=[{"rank": 16, "seed": 0}, {"rank": 16, "adapter": "clorae", "seed": 1}])
    for point in sweep.points:
        finish(point, a_entity=50.0)
    [row] = collected(sweep).rows
    assert list(row.scores) == [0, 1]


def test_a_sweep_of_seeds_alone_has_no_plot(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, seeds=[0, 1])
    for point in sweep.points:
        finish(point, a_entity=50.0 + point.number)
    found = collected(sweep)
    assert (found.keys, found.rows[0].mean("All")) == ([], 50.5)
    assert [path.name for path in write(sweep, found)] == ["sweep.csv", "sweep.json"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "null", "[" * 100000),
        *('{"all": 1}', '{"all": "1", "units": {}}', '{"all": NaN, "units": {}}', '{"all": true, "units": {}}'),
        *('{"all": 1, "units": []}', '{"all": 1, "units": {"a": 3}}', '{"all": 1, "units": {"a": {}}}'),
        '{"all": 1, "units": {"a": {"f1": null}}}',
    ],
)
def test_damaged_scores(text: str, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        read_scores(tmp_path / "scores.json")


def test_scores_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is none"):
        read_scores(tmp_path / "scores.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_scores(tmp_path)


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


@given(st.lists(st.floats(0, 500), min_size=1, max_size=6))
def test_statistics_are_numpys(values: list[float]) -> None:
    row = Row("", {}, {seed: {"All": value} for seed, value in enumerate(values)})
    assert row.mean("All") == pytest.approx(np.mean(values))
    if len(values) > 1:
        assert row.sd("All") == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    else:
        assert row.sd("All") is None
    assert row.mean("b/relation") is None


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


def test_many_lines_become_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    kept: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **how: (kept.append(self), save(self, *given, **how)))
    plot(made(gamma=[1.0, 2.0], rank=list(range(1, MOST_LINES + 2))), tmp_path / "plot.png")
    gamma, rank = kept[0].axes
    assert [text.get_text() for text in rank.get_legend().get_texts()] == ["gamma=1.0", "gamma=2.0"]
    assert [text.get_text() for text in gamma.get_legend().get_texts()] == [f"mean of {MOST_LINES + 1} lines"]
    [mean] = [line for line in gamma.lines if line.get_color() == "black"]
    assert list(mean.get_ydata()) == [4.0, 13.0]


def test_values_are_spelt() -> None:
    assert [spelt(value) for value in (None, [], True, 0.05, ["q", "v"])] == ["none", "none", "true", "0.05", "q v"]
