"""Radar of systems (Figure 4 of the paper)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import ScaledTranslation

from lvlm_clorae.analysis.compare import Row, RunTable
from lvlm_clorae.analysis.plots import MARKS, cut
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import check_free, write_png

MAX_SYSTEMS = 8  # that can be distinguished in one radar
_LABEL_INCHES = 0.9  # height of an axis label at the foot of a radar, with the space around it


def plot_radar(table: RunTable, path: Path) -> list[str]:
    """Draw a radar with an axis a dataset task and a line a row that has scores of all of them.

    If the table has several rows for each of several bases, each base gets a radar of its own. Each axis shows the
    share of the best mean in its radar, which is 100. The paper's Figure 4 does not say how it is normalized.

    Returns a line for each row that is not plotted.

    Raises:
        UserError: too few dataset tasks, no complete row or too many; or the file exists or cannot be written
    """
    check_free(path)
    if len(table.dataset_tasks) < 3:
        raise UserError(f"{path}: a radar needs three dataset tasks, but there are {len(table.dataset_tasks)}.")
    complete = [row for row in table.rows if all(row.values(name) for name in table.dataset_tasks)]
    if not complete:
        raise UserError(f"{path}: no run has scores of all dataset tasks. Choose some with --dataset_tasks.")
    by_base: dict[str, list[Row]] = {}
    for row in complete:
        by_base.setdefault(row.config.model, []).append(row)
    separate = len(by_base) > 1 and all(len(rows) > 1 for rows in by_base.values())
    panels = [(Path(base).name, rows) for base, rows in by_base.items()] if separate else [("", complete)]
    most = max(len(rows) for _, rows in panels)
    if most > MAX_SYSTEMS:
        raise UserError(f"{path}: {most} systems are too many for one radar. Give at most {MAX_SYSTEMS}.")

    figure = Figure(
        figsize=(6.4 * len(panels), 5.8 + 0.24 * most), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    )
    shared = figure.subplots(1, len(panels), squeeze=False, subplot_kw={"projection": "polar"}).flat
    for axes, (title, rows) in zip(shared, panels, strict=True):
        _radar(axes, title, rows, table.dataset_tasks)
    figure.suptitle("test F1, % of the best on each axis", fontsize="medium")
    write_png(figure, path, dpi=130)
    return [f"not plotted: {row.name}, it has no scores of a dataset task" for row in table.rows if row not in complete]


def normalized(rows: list[Row], dataset_tasks: list[str]) -> list[list[float]]:
    """Shares of the best mean by row and dataset task, in percent; 0 if the best is 0."""
    means = [[row.mean(name) or 0.0 for name in dataset_tasks] for row in rows]
    best = [max(column) for column in zip(*means, strict=True)]
    return [[100 * (mean / top) if top > 0 else 0.0 for mean, top in zip(row, best, strict=True)] for row in means]


def radar_floor(shares: list[list[float]]) -> float:
    """The share at the centre of a radar: a step of 10 below the lowest, so that similar systems differ visibly."""
    return max(0.0, 10 * math.floor(min(map(min, shares)) / 10 - 0.5))


def _radar(axes: Any, title: str, rows: list[Row], dataset_tasks: list[str]) -> None:
    shares = normalized(rows, dataset_tasks)
    floor = radar_floor(shares)
    angles = [2 * math.pi * number / len(dataset_tasks) for number in range(len(dataset_tasks))]
    for number, (row, values) in enumerate(zip(rows, shares, strict=True)):
        style = {"color": f"C{number}", "marker": MARKS[number], "markersize": 5, "linewidth": 1.5}
        label = cut(row.name.replace(f" {title}", "", 1) if title else row.name, 60)
        axes.plot([*angles, angles[0]], [*values, values[0]], label=label, clip_on=False, **style)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    best = [max(row.mean(name) or 0.0 for row in rows) for name in dataset_tasks]
    labels = [f"{name}\nbest {top:.1f}".replace("/", "\n") for name, top in zip(dataset_tasks, best, strict=True)]
    axes.set_xticks(angles, labels, fontsize="small")
    axes.tick_params(axis="x", pad=12)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        right = math.sin(angle)  # labels stand beside the circle, not across it
        label.set_horizontalalignment("left" if right > 0.1 else "right" if right < -0.1 else "center")
    axes.set_ylim(floor, 101)
    step = 5 if floor >= 80 else 10 if floor >= 50 else 20
    rings = [ring for ring in range(0, 101, step) if ring > floor]
    axes.set_yticks(rings, [str(ring) for ring in rings], fontsize="x-small", color="dimgrey")
    axes.set_rlabel_position(180 / len(dataset_tasks))  # between two axes
    if title:
        axes.set_title(title, y=1.2)  # without y matplotlib would move it out of the figure
    below = axes.transAxes + ScaledTranslation(0, -_LABEL_INCHES, axes.figure.dpi_scale_trans)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    axes.legend(**place, frameon=False, fontsize="small", borderpad=0)
