"""What a run has learnt, epoch by epoch: dev F1 of each unit, and the weight that the achievement loss gave it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvlm_clorae.files import atomic_path

PLOT = "progress.png"


def plot_progress(run: Path) -> None:
    """Draw ``progress.png`` of a run directory from its ``metrics.jsonl``; nothing where no epoch was evaluated."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [record for record in records if record["kind"] == "dev"]
    if not evaluated:
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 7), layout="constrained")
    scores, weights = figure.subplots(2, 1, sharex=True)
    epochs = [record["epoch"] for record in evaluated]
    for unit in evaluated[0]["f1"]:
        (line,) = scores.plot(epochs, [record["f1"][unit] for record in evaluated], marker="o", label=unit)
        if unit in evaluated[0]["weights"]:
            _steps(weights, evaluated, unit, line.get_color())
    total = [sum(record["f1"].values()) / len(record["f1"]) for record in evaluated]
    scores.plot(epochs, total, color="black", linestyle="--", label="mean (All / datasets)")
    scores.set(ylabel="dev F1, %", ylim=(0, 100))
    scores.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    weights.axhline(1, color="grey", linewidth=0.8)
    weights.set(xlabel="epoch", ylabel="weight of its cross-entropy")
    weights.xaxis.set_major_locator(MaxNLocator(integer=True))
    with atomic_path(run / PLOT) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _steps(axes: Any, evaluated: list[dict[str, Any]], unit: str, colour: str) -> None:
    """The weight that holds from one evaluation to the next; before the first it was as at the start."""
    epochs = [record["epoch"] for record in evaluated]
    axes.step(
        [*epochs, epochs[-1] + 1],
        [*(r["weights"][unit] for r in evaluated), evaluated[-1]["weights"][unit]],
        where="post",
        color=colour,
    )
