"""Plots of a run directory's ``metrics.jsonl``: training progress and gradient conflict."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_clorae.files import write_png

PROGRESS, CONFLICTS = "progress.png", "conflicts.png"


def plot_progress(run: Path) -> None:
    """Plot dev F1 and achievement weight of each dataset task by epoch; nothing without evaluations."""
    records = _records(run, "dev")
    if not records:
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 7), layout="constrained")
    scores, weights = figure.subplots(2, 1, sharex=True)
    epochs = [record["epoch"] for record in records]
    style: dict[str, Any] = {"marker": "o", "clip_on": False}  # markers on the edge of the axes stay whole
    for name in records[0]["f1"]:
        (line,) = scores.plot(epochs, [record["f1"][name] for record in records], label=name, **style)
        if name in records[0]["weights"]:  # in use from one evaluation to the next
            values = [record["weights"][name] for record in records]
            weights.plot(epochs, values, drawstyle="steps-post", color=line.get_color(), **style)
    mean = [sum(record["f1"].values()) / len(record["f1"]) for record in records]
    scores.plot(epochs, mean, color="black", linestyle="--", label="mean (All / datasets)", clip_on=False)
    scores.set(ylabel="dev F1, %", ylim=(0, 100))
    scores.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    weights.axhline(1, color="grey", linewidth=0.8)
    weights.set(xlabel="epoch", ylabel="weight of the cross-entropy", xlim=(min(epochs[0], epochs[-1] - 1), epochs[-1]))
    weights.xaxis.set_major_locator(MaxNLocator(integer=True))
    write_png(figure, run / PROGRESS, dpi=110)


def plot_conflicts(run: Path) -> None:
    """Plot the mean cosines of every measurement (training/gradients.py) above their mean matrix."""
    records = _records(run, "conflicts")
    if not records:
        return
    from matplotlib.figure import Figure

    dataset_tasks = records[-1]["dataset_tasks"]
    side = max(2.5, 0.7 * len(dataset_tasks))
    figure = Figure(figsize=(side + 4, side + 5), layout="constrained")
    curves, heat_map = figure.subplots(2, 1, height_ratios=[3, side])
    _draw_curves(curves, records)
    _draw_heat_map(figure, heat_map, dataset_tasks, mean_matrix(records), len(records))
    write_png(figure, run / CONFLICTS, dpi=110)


def mean_matrix(records: list[dict[str, Any]]) -> np.ndarray:
    """Return the mean ``[U, U]`` of the defined values of the records' matrices; NaN without one."""
    matrices = np.array([record["matrix"] for record in records], dtype=float)
    known = np.isfinite(matrices)
    total, count = np.where(known, matrices, 0).sum(0), known.sum(0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _draw_curves(axes: Any, records: list[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    lowest = -0.2
    for name, label, color, line in (
        ("within", "within a dataset", "grey", "--"),
        ("between", "between datasets", "C0", "-"),
        ("negative", "share of pairs below 0", "C3", ":"),
    ):
        values = np.array([record[name] for record in records], dtype=float)  # None becomes NaN
        axes.plot(steps, values, marker=".", label=label, color=color, linestyle=line)
        lowest = min([lowest, *(values[np.isfinite(values)] - 0.05)])
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="mean cosine of gradients", ylim=(lowest, 1.02))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def _draw_heat_map(figure: Any, axes: Any, dataset_tasks: list[str], matrix: np.ndarray, count: int) -> None:
    image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(dataset_tasks)), dataset_tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(dataset_tasks)), dataset_tasks)
    for (row, column), value in np.ndenumerate(matrix):
        text, color = "" if np.isnan(value) else f"{value:.2f}", "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set_title(f"mean of {count} measurement{'s' * (count > 1)}; diagonal: two batches of one dataset", fontsize=9)
    figure.colorbar(image, ax=axes)
