"""How the datasets' gradients agree (training/conflicts.py): over the run, and between which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_clorae.files import atomic_path

PLOT = "conflicts.png"


def plot_conflicts(run: Path) -> None:
    """Draw ``conflicts.png`` of a run directory from its ``metrics.jsonl``; nothing where nothing was measured.

    Above the mean cosines of every measurement; below the matrix, the mean of all measurements.
    """
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [record for record in records if record["kind"] == "conflicts"]
    if not measured:
        return
    from matplotlib.figure import Figure

    units = measured[-1]["units"]
    side = max(2.5, 0.7 * len(units))
    figure = Figure(figsize=(side + 4, side + 5), layout="constrained")
    over, between = figure.subplots(2, 1, height_ratios=[3, side])
    _over_steps(over, measured)
    _heat_map(figure, between, units, mean_matrix(measured), len(measured))
    with atomic_path(run / PLOT) as partial:
        figure.savefig(partial, format="png", dpi=110)


def mean_matrix(measured: list[dict[str, Any]]) -> np.ndarray:
    """The mean ``[U, U]`` of the records' matrices, of what each could tell; NaN where none could."""
    matrices = np.array([record["matrix"] for record in measured], dtype=float)
    known = np.isfinite(matrices)
    total, count = np.where(known, matrices, 0).sum(0), known.sum(0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _over_steps(axes: Any, measured: list[dict[str, Any]]) -> None:
    steps = [record["step"] for record in measured]
    lines = {
        "within": ("within a dataset", {"color": "grey", "linestyle": "--"}),
        "between": ("between datasets", {"color": "C0"}),
        "negative": ("share of pairs below 0", {"color": "C3", "linestyle": ":"}),
    }
    lowest = -0.2
    for name, (label, style) in lines.items():
        values = np.array([record[name] for record in measured], dtype=float)  # None becomes NaN
        axes.plot(steps, values, marker=".", label=label, **style)
        lowest = min([lowest, *(values[np.isfinite(values)] - 0.05)])
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="mean cosine of gradients", ylim=(lowest, 1.02))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def _heat_map(figure: Any, axes: Any, units: list[str], matrix: np.ndarray, count: int) -> None:
    image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(units)), units, rotation=30, ha="right")
    axes.set_yticks(range(len(units)), units)
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            shade = "white" if abs(value) > 0.6 else "black"
            text = "" if np.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=shade)
    axes.set_title(f"mean of {count} measurement{'s' * (count > 1)}; diagonal: two batches of one dataset", fontsize=9)
    figure.colorbar(image, ax=axes)
