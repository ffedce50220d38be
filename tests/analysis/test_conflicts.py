"""The picture of how the datasets' gradients agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lvlm_clorae.analysis.conflicts import PLOT, mean_matrix, plot_conflicts


def measured(step: int, between: float | None, matrix: list[list[float | None]]) -> dict[str, Any]:
    units = [f"set{number}/entity" for number in range(len(matrix))]
    values = {"between": between, "within": 0.5, "negative": 0.25, "units": units, "matrix": matrix}
    return {"step": step, "kind": "conflicts", **values}


RECORDS = [
    {"step": 1, "kind": "train", "loss": 3.0},
    measured(0, 0.1, [[0.5, 0.1], [0.1, None]]),
    measured(20, None, [[0.7, None], [None, None]]),
]


def write(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_it_shows_every_measurement_and_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (figures.append(self), save(self, *args, **how)))
    write(tmp_path, RECORDS)
    plot_conflicts(tmp_path)
    assert Image.open(tmp_path / PLOT).size[0] > 400
    assert sorted(path.name for path in tmp_path.iterdir()) == [PLOT, "metrics.jsonl"]
    over, between = figures[0].axes[:2]
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in over.get_lines()}
    assert drawn["within a dataset"] == [0.5, 0.5]
    assert drawn["between datasets"][0] == 0.1
    assert np.isnan(drawn["between datasets"][1])
    assert [text.get_text() for text in between.texts] == ["0.60", "0.10", "0.10", ""]
    assert [label.get_text() for label in between.get_yticklabels()] == ["set0/entity", "set1/entity"]


def test_the_mean_is_of_what_could_be_told() -> None:
    matrix = mean_matrix(RECORDS[1:])
    assert np.allclose(matrix, [[0.6, 0.1], [0.1, np.nan]], equal_nan=True)


def test_one_dataset_has_a_picture_too(tmp_path: Path) -> None:
    alone = measured(0, None, [[0.5]]) | {"negative": None}
    write(tmp_path, [alone])
    plot_conflicts(tmp_path)
    assert (tmp_path / PLOT).exists()


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    write(tmp_path, RECORDS[:1])
    plot_conflicts(tmp_path)
    assert not (tmp_path / PLOT).exists()
