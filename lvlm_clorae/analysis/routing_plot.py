"""The picture of a routing: a heat map of every layer, and Figure 6's bars of the bottom, middle and top blocks."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_clorae.analysis.routing import Panel, Place, Routing
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import atomic_path

PLOT = "routing.png"
MOST_NAMES = 48
"""Columns of a heat map up to which every layer's name is written under it."""
_ATTENTION = re.compile(r"_?(attention|attn)$", re.IGNORECASE)


def check_free(path: Path) -> None:
    """Raises UserError where there is something of the name already, which is never overwritten."""
    if os.path.lexists(path):
        raise UserError(f"{path}: is there already, and is not overwritten. Remove it or choose another name.")


def plot_routing(routing: Routing, path: Path) -> None:
    """Draw ``path`` as PNG, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.figure import Figure

    panels, units = routing.panels(), list(routing.samples)
    named = [len(routing.layers_of(panel)) <= MOST_NAMES for panel in panels]
    heights = [0.9 + 0.26 * len(units) + 0.8 * names for names in named]
    figure = Figure(figsize=(14, 0.8 + sum(heights)), layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(3, 1.1), height_ratios=heights)
    for panel, names, (heat, bars) in zip(panels, named, rows, strict=True):
        image = _heat_map(heat, routing, panel, names)
        _bars(bars, routing, panel)
    figure.colorbar(
        image, ax=rows[:, 0], location="top", aspect=60, pad=0.01, label="tokens given to the task expert, %"
    )
    figure.legend(*rows[0, 1].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    try:
        with atomic_path(path) as partial:
            figure.savefig(partial, format="png", dpi=100)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}). Choose another place.") from None


def _heat_map(axes: Any, routing: Routing, panel: Panel, names: bool) -> Any:
    """Units by layers, block after block; grey where a unit has no such token."""
    from matplotlib import colormaps

    layers, units = routing.layers_of(panel), list(routing.samples)
    shares = [[_percent(routing.tallies[unit][name][panel.kind].share) for name in layers] for unit in units]
    colours = colormaps["RdBu_r"].with_extremes(bad="0.8")
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.set_title(f"{panel.title} tokens", loc="left")
    axes.set_yticks(range(len(units)), units)
    blocks = [place.block for place in layers.values()]
    starts = [column for column, block in enumerate(blocks) if column == 0 or block != blocks[column - 1]]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="black", linewidth=1.5)
    ends = [*starts[1:], len(blocks)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    top = axes.secondary_xaxis("top")
    top.set_xticks(middles, [f"block {blocks[start]}" if len(starts) <= 8 else f"{blocks[start]}" for start in starts])
    top.tick_params(length=0)
    axes.set_xticks(range(len(layers)), _names(layers) if names else [""] * len(layers), rotation=90, fontsize=8)
    axes.tick_params(axis="x", length=0)
    return image


def _names(layers: Mapping[str, Place]) -> list[str]:
    """Each layer's name inside its block, as short as tells it from others: ``k``, or ``Self.q`` and ``EncDec.q``."""
    parts = [place.module.split(".") for place in layers.values()]
    often = Counter((place.block, part[-1]) for place, part in zip(layers.values(), parts, strict=True))
    return [
        part[-1] if often[place.block, part[-1]] == 1 else f"{_ATTENTION.sub('', ''.join(part[-2:-1]))}.{part[-1]}"
        for place, part in zip(layers.values(), parts, strict=True)
    ]


def _bars(axes: Any, routing: Routing, panel: Panel) -> None:
    """A group a band, a bar a unit."""
    bands, units = {band: blocks for band, blocks in routing.bands(panel.stack).items() if blocks}, routing.samples
    width = 0.8 / len(units)
    for number, unit in enumerate(units):
        shares = [_percent(routing.total(unit, panel, blocks).share) for blocks in bands.values()]
        offset = (number - (len(units) - 1) / 2) * width
        axes.bar([group + offset for group in range(len(bands))], shares, width, label=unit)
    axes.axhline(50, color="grey", linewidth=0.8, linestyle="--")
    axes.set(ylim=(0, 100), ylabel="to task expert, %")
    labels = [f"{band}\n({', '.join(map(str, blocks))})" for band, blocks in bands.items()]
    axes.set_xticks(range(len(bands)), labels)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share
