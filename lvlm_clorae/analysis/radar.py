"""Figure 4 of the paper: a radar with an axis a unit and a line a system, scores normalised on each axis."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvlm_clorae.analysis.compare import Comparison, System
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import atomic_path

MOST = 8
"""Systems that can be told apart in one radar."""
LABEL_INCHES = 0.9
"""Height of an axis's label at the foot of the circle, with the space around it."""
_MARKS = "osD^vPX*"


def check_png(path: Path) -> None:
    """Raises UserError where the file exists: nothing is overwritten."""
    if os.path.lexists(path):
        raise UserError(f"{path}: is there already, and is not overwritten. Remove it or choose another name.")


def draw(found: Comparison, path: Path) -> list[str]:
    """Draw the systems that have scores of all columns; a radar for each base where each base has several of them.

    On each axis the best system of its radar is 100 and another its share of that. The paper's Figure 4 is "normalized"
    without saying how; this way the shares are those of the F1, and the rings say where the axes begin.

    Returns:
        what is not drawn, a line each

    Raises:
        UserError: fewer than three columns, too many systems or none in a radar, a file that exists or cannot be
            written.
    """
    check_png(path)
    if len(found.units) < 3:
        raise UserError(f"{path}: a radar needs three columns, but there are {len(found.units)}. Leave --png out.")
    whole = [system for system in found.systems if all(system.row.mean(unit) is not None for unit in found.units)]
    if not whole:
        raise UserError(f"{path}: no run has scores of all columns. Choose columns with --units, or leave --png out.")
    panels = list(_panels(whole))
    for _, systems in panels:
        if len(systems) > MOST:
            raise UserError(f"{path}: {len(systems)} systems cannot be told apart in a radar. Give up to {MOST}.")

    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    most = max(len(systems) for _, systems in panels)
    figure = Figure(figsize=(6.4 * len(panels), 5.8 + 0.24 * most), layout=layout)
    shared = figure.subplots(1, len(panels), squeeze=False, subplot_kw={"projection": "polar"}).flat
    for axes, (title, systems) in zip(shared, panels, strict=True):
        _panel(axes, title, systems, found.units)
    figure.suptitle("test F1, % of the best on each axis", fontsize="medium")
    try:
        with atomic_path(path) as partial:
            figure.savefig(partial, format="png", dpi=130)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}). Choose another place.") from None
    return [f"not drawn: {system.name}, which lacks a column" for system in found.systems if system not in whole]


def normalised(systems: list[System], units: list[str]) -> list[list[float]]:
    """Of each system and unit the share of the best one's mean, in percent; 0 where no system has hit anything."""
    means = [[system.row.mean(unit) or 0.0 for unit in units] for system in systems]
    best = [max(column) for column in zip(*means, strict=True)]
    return [[100 * (mean / top) if top > 0 else 0.0 for mean, top in zip(row, best, strict=True)] for row in means]


def floor_of(shares: list[list[float]]) -> float:
    """Where the axes begin: a step of 10 below the lowest share, so that near systems lie apart."""
    return max(0.0, 10 * math.floor(min(map(min, shares)) / 10 - 0.5))


def _panels(systems: list[System]) -> Iterator[tuple[str, list[System]]]:
    """(title, systems) of each radar."""
    by_base: dict[str, list[System]] = {}
    for system in systems:
        by_base.setdefault(system.config.model, []).append(system)
    if len(by_base) > 1 and all(len(of_base) > 1 for of_base in by_base.values()):
        for base, of_base in by_base.items():
            yield Path(base).name, of_base
    else:
        yield "", systems


def _panel(axes: Any, title: str, systems: list[System], units: list[str]) -> None:
    shares = normalised(systems, units)
    floor = floor_of(shares)
    angles = [2 * math.pi * number / len(units) for number in range(len(units))]
    for number, (system, row) in enumerate(zip(systems, shares, strict=True)):
        axes.plot(
            [*angles, angles[0]],
            [*row, row[0]],
            color=f"C{number}",
            marker=_MARKS[number],
            markersize=5,
            linewidth=1.5,
            label=_label(system.name, title),
        )
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    best = [max(system.row.mean(unit) or 0.0 for system in systems) for unit in units]
    labels = [f"{unit.replace('/', chr(10))}\n100 = {top:.1f}" for unit, top in zip(units, best, strict=True)]
    axes.set_xticks(angles, labels, fontsize="small")
    axes.tick_params(axis="x", pad=12)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        right = math.sin(angle)  # labels stand beside the circle, not across it
        label.set_horizontalalignment("left" if right > 0.1 else "right" if right < -0.1 else "center")
    axes.set_ylim(floor, 101)
    step = 5 if floor >= 80 else 10 if floor >= 50 else 20
    rings = [ring for ring in range(0, 101, step) if ring > floor]
    axes.set_yticks(rings, [str(ring) for ring in rings], fontsize="x-small", color="dimgrey")
    axes.set_rlabel_position(180 / len(units))  # between two axes
    if title:
        axes.set_title(title, y=1.2)  # given, since matplotlib would move it out of the picture
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -LABEL_INCHES, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, frameon=False, fontsize="small", borderpad=0
    )


def _label(name: str, title: str) -> str:
    """What the legend calls a system; its base stands in the title. A dollar sign would begin a formula."""
    name = name.replace(f" {title}", "", 1) if title else name
    name = name.replace("$", r"\$")
    return name if len(name) <= 60 else name[:59] + "…"
