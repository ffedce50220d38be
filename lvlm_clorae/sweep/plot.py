"""The plots of a sweep: All against the values of each varied setting, and each unit's F1 (Figure 5 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lvlm_clorae.files import atomic_path
from lvlm_clorae.sweep.collect import ALL, Collected, Row, spelt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 8
"""Lines that a panel names; of more it shows the mean, and them behind it."""
MOST_PANELS = 12
"""Panels of units that are drawn; the ones with the most values first."""
_LONGEST = 28
_MARKS = "osD^vPX*"


def plot(found: Collected, path: Path) -> None:
    """Draw the rows: a line for each combination of the other settings, a bar for the standard deviation over seeds.

    Values stand at equal distances, numbers in their order: 32, 64, 128 and 1e-5, 1e-4 are as readable as names.
    """
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    for key, axes in zip(found.keys, _grid(figure, len(found.keys)), strict=True):
        _panel(axes, key, found)
    _save(figure, path)


def plot_units(found: Collected, path: Path) -> bool:
    """Draw a line for each unit against a setting of numbers: Figure 5 of the paper, where it is the rank or dropout.

    A panel for each such setting and each combination of the others that has two or more of its values.

    Returns:
        whether there was anything to draw
    """
    from matplotlib.figure import Figure

    panels = unit_panels(found)
    if not panels:
        return False
    figure = Figure(layout="constrained")
    for panel, axes in zip(panels, _grid(figure, len(panels)), strict=True):
        _unit_panel(axes, *panel, [name for name in found.names if name != ALL])
    handles, units = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, units, loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)
    return True


def unit_panels(found: Collected) -> list[tuple[str, str, list[Row]]]:
    """(setting, the other settings that are varied, rows) of each panel of :func:`plot_units`."""
    panels = []
    for key in found.keys:
        if all(_is_number(row.settings[key]) for row in found.rows):
            panels += [(key, label, rows) for label, rows in lines(found, key) if len(rows) > 1]
    chosen = sorted(panels, key=lambda panel: -len(panel[2]))[:MOST_PANELS]
    return [panel for panel in panels if panel in chosen]


def lines(found: Collected, key: str) -> list[tuple[str, list[Row]]]:
    """The rows by the values of all varied settings but ``key``, with what the legend calls these."""
    grouped: dict[str, tuple[str, list[Row]]] = {}
    for row in found.rows:
        others = {other: row.settings[other] for other in found.keys if other != key}
        label = ", ".join(f"{other}={_cut(value)}" for other, value in others.items())
        grouped.setdefault(repr(others), (label, []))[1].append(row)
    return list(grouped.values())


def ordered(values: Iterable[Any]) -> list[Any]:
    """The distinct values: numbers in their order, after none; others as they come."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    if all(value is None or _is_number(value) for value in distinct):
        distinct.sort(key=lambda value: float("-inf") if value is None else value)
    return distinct


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _grid(figure: Figure, panels: int) -> list[Any]:
    """So many axes, two beside one another."""
    columns = min(2, panels)
    rows = -(-panels // columns)
    figure.set_size_inches(7.5 * columns, 4.2 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for left in axes[panels:]:
        left.set_axis_off()
    return axes[:panels]


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _ticks(axes: Any, values: list[Any]) -> None:
    """The values at equal distances."""
    labels = [_cut(value) for value in values]
    crowded = sum(map(len, labels)) > 40
    axes.set_xticks(range(len(values)), labels, rotation=20 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlim(-0.5, len(values) - 0.5)


def _panel(axes: Any, key: str, found: Collected) -> None:
    values = ordered(row.settings[key] for row in found.rows)
    grouped = lines(found, key)
    if len(grouped) > MOST_LINES:  # points that vary something else: no lines
        grouped = [(label, rows) for label, rows in grouped if len(rows) > 1] or grouped
    named = len(grouped) <= MOST_LINES
    for number, (label, rows) in enumerate(grouped):
        places = sorted(((values.index(row.settings[key]), row) for row in rows), key=lambda pair: pair[0])
        shift = 0.03 * (number - (len(grouped) - 1) / 2) if named else 0.0  # bars beside, not over one another
        axes.errorbar(
            [place + shift for place, _ in places],
            [row.mean(ALL) for _, row in places],
            yerr=[row.sd(ALL) or 0.0 for _, row in places],
            marker="o",
            capsize=3,
            **({"label": label} if named else {"color": "lightgrey", "linewidth": 0.8, "markersize": 3}),
        )
    if not named:
        drawn = [row for _, rows in grouped for row in rows]
        means = [fmean(row.mean(ALL) or 0.0 for row in drawn if row.settings[key] == value) for value in values]
        axes.plot(range(len(values)), means, color="black", marker="o", zorder=3, label=f"mean of {len(grouped)} lines")
    _ticks(axes, values)
    axes.set(xlabel=key, ylabel="All, test F1")
    if len(grouped) > 1:
        axes.legend(frameon=False, fontsize="small")


def _unit_panel(axes: Any, key: str, label: str, rows: list[Row], units: list[str]) -> None:
    values = ordered(row.settings[key] for row in rows)
    rows = sorted(rows, key=lambda row: values.index(row.settings[key]))
    for number, unit in enumerate(units):
        scored = [row for row in rows if row.mean(unit) is not None]
        axes.errorbar(
            [values.index(row.settings[key]) for row in scored],
            [row.mean(unit) for row in scored],
            yerr=[row.sd(unit) or 0.0 for row in scored],
            marker=_MARKS[number % len(_MARKS)],
            capsize=3,
            label=unit,
        )
    _ticks(axes, values)
    axes.set(xlabel=key, ylabel="test F1", title=label)


def _cut(value: Any) -> str:
    text = spelt(value).replace("\n", " ").replace("$", r"\$")  # a dollar sign would begin a formula
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
