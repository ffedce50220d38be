"""The table of a sweep: means over seeds, and nothing silently left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.sweep.collect import Row, read_scores, spelt
from lvlm_clorae.sweep.points import Sweep
from tests.sweep.helpers import collected, finish, sweep_of


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


def test_rows_are_by_what_points_have_not_by_how_they_are_written(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, points=[{"rank": 16, "seed": 0}, {"rank": 16, "adapter": "clorae", "seed": 1}])
    for point in sweep.points:
        finish(point, a_entity=50.0)
    [row] = collected(sweep).rows
    assert list(row.scores) == [0, 1]


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


@given(st.lists(st.floats(0, 500), min_size=1, max_size=6))
def test_statistics_are_numpys(values: list[float]) -> None:
    row = Row("", {}, {seed: {"All": value} for seed, value in enumerate(values)})
    assert row.mean("All") == pytest.approx(np.mean(values))
    if len(values) > 1:
        assert row.sd("All") == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    else:
        assert row.sd("All") is None
    assert row.mean("b/relation") is None


def test_values_are_spelt() -> None:
    assert [spelt(value) for value in (None, [], True, 0.05, ["q", "v"])] == ["none", "none", "true", "0.05", "q v"]
