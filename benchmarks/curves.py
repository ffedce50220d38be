"""Draw the learning curves of a run in a results file of real.py: cross-entropy and dev F1 of each dataset task.

    python benchmarks/curves.py benchmarks/results/real-<date>.json --system "C-LoRAE, all data" --output curves.png

Points are the logged micro-steps, lines their running mean. Runs of several seeds are drawn together.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm_clorae.files import write_png

WINDOW = 9
"""Logged micro-steps of a dataset task in the running mean."""
Points = dict[str, list[tuple[int, float]]]
"""(step, value) by dataset task."""


def losses(curve: Iterable[Mapping[str, Any]]) -> Points:
    """The logged cross-entropies of a run."""
    found: Points = defaultdict(list)
    for line in curve:
        if "ce" in line:
            found[line["dataset_task"]].append((line["step"], line["ce"]))
    return dict(found)


def scores(curve: Iterable[Mapping[str, Any]]) -> Points:
    """The dev F1 of a run after each evaluation [percent]."""
    found: Points = defaultdict(list)
    for line in curve:
        for dataset_task, f1 in line.get("f1", {}).items():
            found[dataset_task].append((line["step"], f1))
    return dict(found)


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """The mean of each value and up to ``window - 1`` before it."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [math.fsum(part) / len(part) for part in parts]


def draw(runs: Sequence[Sequence[Mapping[str, Any]]], title: str, path: Path) -> None:
    """Draw the curves of some runs, a panel for each dataset task."""
    from matplotlib.figure import Figure

    all_losses, all_scores = [losses(run) for run in runs], [scores(run) for run in runs]
    names = sorted({name for found in (*all_losses, *all_scores) for name in found})
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.6 * rows + 0.6), layout="constrained")
    for name, axes in zip(names, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
        right = axes.twinx()
        for loss, f1 in zip(all_losses, all_scores, strict=True):
            steps, values = zip(*loss.get(name, [(math.nan, math.nan)]), strict=True)
            axes.plot(steps, values, ".", color="C0", alpha=0.25, markersize=3)
            axes.plot(steps, running_mean(values), color="C0")
            steps, values = zip(*f1.get(name, [(math.nan, math.nan)]), strict=True)
            right.plot(steps, values, "o--", color="C1", clip_on=False)
        axes.set(title=name, xlabel="optimizer step")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("cross-entropy", color="C0")
        right.set_ylim(0, 100)
        right.set_ylabel("dev F1, %", color="C1")
    figure.suptitle(title)
    write_png(figure, path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Draw the curves of a system; exit with code 2 if the file has none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results file of real.py")
    parser.add_argument("--system", required=True, help="name of the system")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    options = parser.parse_args(argv)
    content = json.loads(options.results.read_text(encoding="utf-8"))
    kept = [one for one in content["runs"] if one["run"]["system"] == options.system and one["result"]["curve"]]
    if not kept:
        parser.error(f'{options.results}: no run of "{options.system}" has a curve.')
    draw([one["result"]["curve"] for one in kept], f"{options.system}, {len(kept)} run(s)", options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
