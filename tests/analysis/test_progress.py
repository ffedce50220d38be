"""The plot of a run: every evaluated epoch, in one picture that appears whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from lvlm_clorae.analysis.progress import PLOT, plot_progress


def dev(epoch: int, weights: tuple[float, float], *f1: float) -> dict[str, object]:
    units = ("a/x", "b/y", "c/z")  # the last is not trained
    scores, weighed = dict(zip(units, f1, strict=True)), dict(zip(units, weights, strict=False))
    return {"step": 4 * epoch, "kind": "dev", "epoch": epoch, "f1": scores, "weights": weighed}


RECORDS = [{"step": 1, "kind": "train", "loss": 3.0}, dev(1, (1.2, 0.8), 10, 30, 0), dev(2, (1.1, 0.9), 40, 50, 3)]


def write(run: Path, records: list[dict[str, object]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_it_shows_f1_and_weights_of_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (figures.append(self), save(self, *args, **how)))
    write(tmp_path, RECORDS)
    plot_progress(tmp_path)
    assert Image.open(tmp_path / PLOT).size[0] > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", PLOT]
    (figure,) = figures
    scores, weights = figure.axes
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in scores.get_lines()}
    assert drawn == {"a/x": [10, 40], "b/y": [30, 50], "c/z": [0, 3], "mean (All / datasets)": [40 / 3, 31]}
    assert [list(line.get_ydata()) for line in weights.get_lines()[:2]] == [[1.2, 1.1, 1.1], [0.8, 0.9, 0.9]]


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    write(tmp_path, RECORDS[:1])
    plot_progress(tmp_path)
    assert not (tmp_path / PLOT).exists()
