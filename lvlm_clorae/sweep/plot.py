"""The plot of a sweep: a panel for each setting that it varies, All against that setting's values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from lvlm_clorae.files import atomic_path
from lvlm_clorae.sweep.collect import ALL, Collected, Row, spelt

MOST_LINES = 8
"""Lines that a panel names; of more it shows the mean, and them behind it."""
_LONGEST = 28


def plot(found: Collected, path: Path) -> None:
    """Draw the rows: a line for each combination of the other settings, a bar for the standard deviation over seeds.

    Values stand at equal distances, numbers in their order: 32, 64, 128 and 1e-5, 1e-4 are as readable as names.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(found.keys))
    rows = -(-len(found.keys) // columns)
    figure = Figure(figsize=(7.5 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for key, axes in zip(found.keys, panels, strict=False):
        _panel(axes, key, found)
    for axes in list(panels):  # what is left of the grid: a flat iterator goes on where zip stopped
        axes.set_axis_off()
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


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
    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in distinct):
        distinct.sort(key=lambda value: float("-inf") if value is None else value)
    return distinct


def _panel(axes: Any, key: str, found: Collected) -> None:
    values = ordered(row.settings[key] for row in found.rows)
    grouped = lines(found, key)
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
        means = [fmean(row.mean(ALL) or 0.0 for row in found.rows if row.settings[key] == value) for value in values]
        axes.plot(range(len(values)), means, color="black", marker="o", zorder=3, label=f"mean of {len(grouped)} lines")
    labels = [_cut(value) for value in values]
    crowded = sum(map(len, labels)) > 40
    axes.set_xticks(range(len(values)), labels, rotation=20 if crowded else 0, ha="right" if crowded else "center")
    axes.set(xlabel=key, ylabel="All, test F1", xlim=(-0.5, len(values) - 0.5))
    if len(grouped) > 1:
        axes.legend(frameon=False, fontsize="small")


def _cut(value: Any) -> str:
    text = spelt(value).replace("\n", " ").replace("$", r"\$")  # a dollar sign would begin a formula
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
