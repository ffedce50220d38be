"""The scores of a sweep's finished points: mean and standard deviation over seeds, of each score."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvlm_clorae.sweep.points import Sweep
from lvlm_clorae.sweep.standing import Standing

ALL = "All"
"""The sum of the units' F1, as it is called in tables."""


@dataclass
class Row:
    """The points that differ in nothing but the seed.

    Args:
        group: what they vary, as in their names; empty where they vary nothing
        settings: the value of every setting that the sweep varies, of those too that these points leave alone
        scores: seed -> {"All" or a unit: test F1 in percent}
    """

    group: str
    settings: dict[str, Any]
    scores: dict[int, dict[str, float]] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        """The scores of a unit, or of all, a seed each; of the seeds that have it."""
        return [scores[name] for scores in self.scores.values() if name in scores]

    def mean(self, name: str) -> float | None:
        return statistics.fmean(self.values(name)) if self.values(name) else None

    def sd(self, name: str) -> float | None:
        """The standard deviation of the sample (n - 1); None for a single seed."""
        return statistics.stdev(self.values(name)) if len(self.values(name)) > 1 else None


@dataclass
class Collected:
    """The rows of a sweep, and what is not in them.

    Args:
        keys: the settings that the sweep varies, besides the seed
        names: ``All`` and the units
        unfinished: (number, name, state) of the points that are not done
        problems: what is wrong with points that are done, a line each
    """

    keys: list[str]
    names: list[str]
    rows: list[Row]
    unfinished: list[tuple[int, str, str]]
    problems: list[str]


def collect(sweep: Sweep, standings: list[Standing]) -> Collected:
    """The rows of the points that are done, in the order of the sweep."""
    rows: dict[str, Row] = {}
    unfinished, problems = [], []
    for point, standing in zip(sweep.points, standings, strict=True):
        if standing.state != "done":
            unfinished.append((point.number, point.name, standing.state))
            continue
        path = point.directory / "scores.json"
        try:
            scores = read_scores(path)
        except ValueError as error:
            problems.append(f"{path}: {error}; the point is left out")
            continue
        settings = {key: getattr(point.config, key) for key in sweep.keys}
        rows.setdefault(repr(settings), Row(point.group, settings)).scores[point.config.seed] = scores
    names = {name: None for row in rows.values() for scores in row.scores.values() for name in scores}
    return Collected(sweep.keys, list(names), list(rows.values()), unfinished, problems)


def read_scores(path: Path) -> dict[str, float]:
    """All, then each unit's F1, of a run's ``scores.json``.

    Raises:
        ValueError: the file is missing or is not what ``training.reporting.scores_json`` writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("there is none, as where shards have no test split") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ValueError("is damaged: no JSON") from None
    try:
        scores = {ALL: content["all"], **{name: unit["f1"] for name, unit in content["units"].items()}}
    except (KeyError, TypeError, AttributeError):
        raise ValueError("is damaged: it has no scores of all and of units") from None
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"is damaged: {name} is {value!r}, which is no number")
    return {name: float(value) for name, value in scores.items()}


def spelt(value: Any) -> str:
    """A setting's value as a table shows it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(value) if isinstance(value, list) else str(value)
