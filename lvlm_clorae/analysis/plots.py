"""Plots: scores over a sweep's settings (Figure 5 of the paper), gate routing (Figure 6).

Files are PNG and appear whole or not at all. matplotlib is imported on first use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lvlm_clorae.analysis.compare import Row, RunTable
from lvlm_clorae.analysis.names import ALL, format_value
from lvlm_clorae.files import write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lvlm_clorae.analysis.routing import Panel, Routing

ROUTING_PLOT = "routing.png"
MAX_LINES = 8  # that a panel of a sweep names; of more it shows the mean, and the lines in grey behind it
MAX_PANELS = 12  # by dataset task; those with the most values are kept
MAX_NAMED_LAYERS = 48  # columns of a heat map up to which every layer is named
_MAX_LABEL = 28
MARKS = "osD^vPX*"


def plot_sweep(table: RunTable, path: Path) -> None:
    """Draw All against each setting of a sweep, with a line for each combination of the other settings.

    Values stand at equal distances, numbers in ascending order. Bars are standard deviations over the seeds.
    """
    figure, grid = _grid(len(table.keys))
    for key, axes in zip(table.keys, grid, strict=True):
        _setting_panel(axes, key, table)
    write_png(figure, path, dpi=110)


def plot_dataset_tasks(table: RunTable, path: Path) -> bool:
    """Draw each dataset task's F1 against each numeric setting of a sweep (Figure 5 of the paper).

    There is a panel for each such setting and each combination of the others with at least two of its values. Returns
    False if there is none.
    """
    panels = dataset_task_panels(table)
    if not panels:
        return False
    figure, grid = _grid(len(panels))
    for (key, label, rows), axes in zip(panels, grid, strict=True):
        values = ordered(row.settings[key] for row in rows)
        for number, name in enumerate(table.dataset_tasks):
            _line(axes, rows, key, values, name, marker=MARKS[number % len(MARKS)], label=name)
        _finish(axes, key, values, "test F1, %", title=label)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    write_png(figure, path, dpi=110)
    return True


def dataset_task_panels(table: RunTable) -> list[tuple[str, str, list[Row]]]:
    """Setting, the other settings and rows of each panel of :func:`plot_dataset_tasks`."""
    panels = []
    for key in table.keys:
        if all(_is_number(row.settings[key]) for row in table.rows):
            panels += [(key, label, rows) for label, rows in lines(table, key) if len(rows) > 1]
    chosen = sorted(panels, key=lambda panel: -len(panel[2]))[:MAX_PANELS]
    return [panel for panel in panels if panel in chosen]


def lines(table: RunTable, key: str) -> list[tuple[str, list[Row]]]:
    """Label and rows of each combination of the settings other than ``key``."""
    grouped: dict[str, tuple[str, list[Row]]] = {}
    for row in table.rows:
        others = {other: row.settings[other] for other in table.keys if other != key}
        label = ", ".join(f"{other}={cut(format_value(value))}" for other, value in others.items())
        grouped.setdefault(repr(others), (label, []))[1].append(row)
    return list(grouped.values())


def ordered(values: Iterable[Any]) -> list[Any]:
    """The distinct values: numbers ascending, after None; others in the given order."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    if all(value is None or _is_number(value) for value in distinct):
        distinct.sort(key=lambda value: float("-inf") if value is None else value)
    return distinct


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _grid(panels: int) -> tuple[Figure, list[Any]]:
    """A figure and its axes, in two columns."""
    from matplotlib.figure import Figure

    columns = min(2, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(7.5 * columns, 4.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes[:panels]


def _setting_panel(axes: Any, key: str, table: RunTable) -> None:
    values = ordered(row.settings[key] for row in table.rows)
    grouped = lines(table, key)
    if len(grouped) > MAX_LINES:  # runs that vary another setting form no line
        grouped = [(label, rows) for label, rows in grouped if len(rows) > 1] or grouped
    named = len(grouped) <= MAX_LINES
    for number, (label, rows) in enumerate(grouped):
        style = {"label": label} if named else {"color": "lightgrey", "linewidth": 0.8, "markersize": 3}
        shift = 0.03 * (number - (len(grouped) - 1) / 2) if named else 0.0  # bars stand beside each other
        _line(axes, rows, key, values, ALL, shift, **style)
    if not named:
        scored = [row for _, rows in grouped for row in rows if row.values(ALL)]
        at = {number: [row for row in scored if row.settings[key] == value] for number, value in enumerate(values)}
        means = {number: fmean(row.mean(ALL) or 0.0 for row in rows) for number, rows in at.items() if rows}
        style = {"color": "black", "marker": "o", "zorder": 3, "label": f"mean of {len(grouped)} lines"}
        axes.plot(list(means), list(means.values()), **style)
    _finish(axes, key, values, "All, test F1")
    if len(grouped) > 1:
        axes.legend(frameon=False, fontsize="small")


def _line(
    axes: Any, rows: list[Row], key: str, values: list[Any], column: str, shift: float = 0.0, **style: Any
) -> None:
    """Draw the rows that have the column, with bars for the standard deviation."""
    scored = sorted((values.index(row.settings[key]), n) for n, row in enumerate(rows) if row.values(column))
    x = [place + shift for place, _ in scored]
    y = [rows[n].mean(column) for _, n in scored]
    yerr = [rows[n].sd(column) or 0.0 for _, n in scored]
    axes.errorbar(x, y, yerr=yerr, capsize=3, clip_on=False, **{"marker": "o", **style})


def _finish(axes: Any, key: str, values: list[Any], ylabel: str, title: str = "") -> None:
    """Label the axes. F1 is never negative, so the axis starts at 0 where the margin would pass it."""
    labels = [cut(format_value(value)) for value in values]
    crowded = sum(map(len, labels)) > 40
    axes.set_xticks(range(len(values)), labels, rotation=20 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set(xlabel=key, ylabel=ylabel, title=title)
    low, high = axes.get_ylim()
    if low < 0:
        axes.set_ylim(0, max(high, 1))


def cut(text: str, length: int = _MAX_LABEL) -> str:
    """Shorten a label to one line; a dollar sign would start a formula."""
    text = text.replace("\n", " ").replace("$", r"\$")
    return text if len(text) <= length else text[: length - 1] + "…"


def plot_routing(routing: Routing, path: Path) -> None:
    """Draw a heat map of every layer, and bars of the bottom, middle and top blocks (Figure 6 of the paper)."""
    from matplotlib.figure import Figure

    panels, dataset_tasks = routing.panels(), list(routing.samples)
    named = [len(routing.layers_of(panel)) <= MAX_NAMED_LAYERS for panel in panels]
    heights = [0.9 + 0.26 * len(dataset_tasks) + 1.2 * names for names in named]
    figure = Figure(figsize=(14, 0.8 + sum(heights)), layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(3, 1.1), height_ratios=heights)
    for panel, names, (heat, bars) in zip(panels, named, rows, strict=True):
        mesh = _heat_map(heat, routing, panel, names)
        _bars(bars, routing, panel)
    label = "tokens given to the task expert, %"
    figure.colorbar(mesh, ax=rows[:, 0], location="top", aspect=60, pad=0.01, label=label)
    figure.legend(*rows[0, 1].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    write_png(figure, path, dpi=100)


def _heat_map(axes: Any, routing: Routing, panel: Panel, names: bool) -> Any:
    """Draw dataset tasks by layers, block after block; grey where a dataset task has no such tokens."""
    from matplotlib import colormaps

    layers, dataset_tasks = routing.layers_of(panel), list(routing.samples)
    tallies = [[routing.tallies[task][name][panel.token_type] for name in layers] for task in dataset_tasks]
    shares = [[_percent(tally.share) for tally in row] for row in tallies]
    colours = colormaps["RdBu_r"].with_extremes(bad="0.8")
    mesh = axes.imshow(shares, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.set_title(f"{panel.title} tokens", loc="left")
    axes.set_yticks(range(len(dataset_tasks)), dataset_tasks)
    blocks = [layer.block for layer in layers.values()]
    starts = [column for column, block in enumerate(blocks) if column == 0 or block != blocks[column - 1]]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="black", linewidth=1.5)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]
    top = axes.secondary_xaxis("top")
    top.set_xticks(middles, [f"block {blocks[start]}" if len(starts) <= 8 else f"{blocks[start]}" for start in starts])
    top.tick_params(length=0)
    labels = [".".join(layer.module.split(".")[-2:]) if names else "" for layer in layers.values()]
    axes.set_xticks(range(len(layers)), labels, rotation=90, fontsize=8)
    axes.tick_params(axis="x", length=0)
    return mesh


def _bars(axes: Any, routing: Routing, panel: Panel) -> None:
    """Draw a group of bars for each band of blocks, with a bar for each dataset task."""
    bands = {band: blocks for band, blocks in routing.bands(panel.stack).items() if blocks}
    width = 0.8 / len(routing.samples)
    for number, dataset_task in enumerate(routing.samples):
        shares = [_percent(routing.total(dataset_task, panel, blocks).share) for blocks in bands.values()]
        offset = (number - (len(routing.samples) - 1) / 2) * width
        axes.bar([group + offset for group in range(len(bands))], shares, width, label=dataset_task)
    axes.axhline(50, color="grey", linewidth=0.8, linestyle="--")
    axes.set(ylim=(0, 100), xlim=(-0.5, len(bands) - 0.5), ylabel="to task expert, %")
    labels = [f"{band}\n({', '.join(map(str, blocks))})" for band, blocks in bands.items()]
    axes.set_xticks(range(len(bands)), labels)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share
