"""What ``sweep collect`` writes: CSV, JSON and the plots."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.sweep.collect import Collected, spelt
from lvlm_clorae.sweep.plot import plot, plot_units
from lvlm_clorae.sweep.points import Sweep


def to_csv(found: Collected) -> str:
    """A line a row: its name, its settings, the number of seeds, mean and standard deviation of every score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}_{what}" for name in found.names for what in ("mean", "sd")]
    writer.writerow(["point", *found.keys, "seeds", *columns])
    for row in found.rows:
        scores = [value for name in found.names for value in (row.mean(name), row.sd(name))]
        writer.writerow([row.group, *(spelt(row.settings[key]) for key in found.keys), len(row.scores), *scores])
    return text.getvalue()


def to_json(sweep: Sweep, found: Collected) -> str:
    rows = [
        {
            "point": row.group,
            "settings": row.settings,
            "seeds": list(row.scores),
            "scores": {
                name: {"mean": row.mean(name), "sd": row.sd(name), "values": row.values(name)} for name in found.names
            },
        }
        for row in found.rows
    ]
    unfinished = [{"number": number, "name": name, "state": state} for number, name, state in found.unfinished]
    content = {
        "sweep": str(sweep.path),
        "keys": found.keys,
        "rows": rows,
        "unfinished": unfinished,
        "problems": found.problems,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write(sweep: Sweep, found: Collected) -> list[Path]:
    """``sweep.csv``, ``sweep.json``, where a setting is varied ``sweep.png`` and, where one of numbers is,
    ``sweep-units.png`` in the sweep's directory."""
    paths = [sweep.output / "sweep.csv", sweep.output / "sweep.json"]
    write_text_atomic(paths[0], to_csv(found))
    write_text_atomic(paths[1], to_json(sweep, found))
    if found.keys:
        paths.append(sweep.output / "sweep.png")
        plot(found, paths[-1])
        if plot_units(found, sweep.output / "sweep-units.png"):
            paths.append(sweep.output / "sweep-units.png")
    return paths
