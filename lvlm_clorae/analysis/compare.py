"""One table of the test F1 of runs, whether of run directories (Tables 2 and 3 of the paper) or of a sweep.

A row stands for the runs that differ only in the seed. No score is dropped silently: what is missing is in the notes.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lvlm_clorae.analysis.names import ALL, deciding, names
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.files import parse_json
from lvlm_clorae.sweep.expand import Sweep
from lvlm_clorae.sweep.status import RunStatus
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import read_config

WEIGHTS = "adapter/adapter_model.safetensors"


@dataclass
class Row:
    """Runs that differ only in the seed. Scores are test F1 in percent."""

    name: str  # empty for a sweep that varies only the seed
    config: TrainConfig  # of the first run
    settings: dict[str, Any]  # what the runs have in common; for a sweep only what it varies
    scores: dict[int, dict[str, float]]  # by seed and column; All only for a run with all columns
    runs: list[Path]  # in the order of the seeds
    trained_parameters: int | None = None  # None unless the run directory has one adapter file

    def values(self, column: str) -> list[float]:
        """Scores of the seeds that have the column."""
        return [scores[column] for scores in self.scores.values() if column in scores]

    def mean(self, column: str) -> float | None:
        """Mean over the seeds; None without a score."""
        return statistics.fmean(self.values(column)) if self.values(column) else None

    def sd(self, column: str) -> float | None:
        """Sample standard deviation (n - 1) over the seeds; None for a single seed."""
        return statistics.stdev(self.values(column)) if len(self.values(column)) > 1 else None


@dataclass
class RunTable:
    """A table of runs."""

    rows: list[Row]
    dataset_tasks: list[str]  # the columns, whose sum is All
    reference: Row | None = None  # None for a sweep
    keys: list[str] = field(default_factory=list)  # settings with a column of their own, which replace the name
    unfinished: list[dict[str, Any]] = field(default_factory=list)  # runs of a sweep that are not done
    notes: list[str] = field(default_factory=list)  # what is left out

    @property
    def columns(self) -> list[str]:
        """The dataset tasks and ``All``."""
        return [*self.dataset_tasks, ALL]

    def difference(self, row: Row, column: str) -> float | None:
        """Mean test F1 minus that of the reference; None if either has no score."""
        mean, other = row.mean(column), self.reference.mean(column) if self.reference else None
        return None if mean is None or other is None else mean - other


class _Run(NamedTuple):
    directory: Path
    config: TrainConfig
    scores: dict[str, float]
    name: str = ""


def compare(
    runs: Sequence[Path], *, reference: Path | None = None, dataset_tasks: Sequence[str] | None = None
) -> RunTable:
    """Compare run directories.

    Args:
        reference: one of the runs, whose row differences are taken to; by default the first
        dataset_tasks: the columns; by default those of any run

    Raises:
        UserError: a path does not exist, no run has scores, or the reference or a dataset task is not among them
    """
    found: list[_Run] = []
    notes: list[str] = []
    for run in runs:
        if not run.exists():
            raise UserError(f"{run}: no such run directory. Give run directories, for example runs/*.")
        if any(run.samefile(other.directory) for other in found):
            continue
        try:
            found.append(_read(run))
        except (UserError, ValueError) as error:
            notes.append(f"left out: {run}: {error}")
    if not found:
        raise UserError("No run has scores on test:" + "".join(f"\n  {note}" for note in notes))
    known = _columns(found)
    for name in dataset_tasks or ():
        if name not in known:
            raise UserError(f'--dataset_tasks: no run has scores of "{name}".{nearest(name, known)}')
    table = _table(found, list(dict.fromkeys(dataset_tasks or known)), deciding, notes)
    called = names([row.config for row in table.rows])
    for row, name in zip(table.rows, called, strict=True):
        row.name = name if called.count(name) == 1 else f"{name} ({row.runs[0]})"
    table.reference = table.rows[0] if reference is None else _find(table.rows, reference)
    table.notes += _missing(table, known)
    return table


def collect(sweep: Sweep, statuses: Sequence[RunStatus]) -> RunTable:
    """Tabulate the runs of a sweep that are done, in the order of the sweep."""
    found, notes, unfinished = [], [], []
    for run, status in zip(sweep.sweep_runs, statuses, strict=True):
        if status.state != "done":
            unfinished.append({"number": run.number, "name": run.name, "state": status.state})
            continue
        try:
            found.append(_Run(run.directory, run.config, read_scores(run.directory / "scores.json"), run.group))
        except ValueError as error:
            notes.append(f"left out: {run.directory}: {error}")
    columns, keys = _columns(found), sweep.keys
    table = _table(found, columns, lambda config: {key: getattr(config, key) for key in keys}, notes)
    table.keys, table.unfinished = keys, unfinished
    table.notes += _missing(table, columns)
    return table


def read_scores(path: Path) -> dict[str, float]:
    """Read the F1 of each dataset task, in percent. Raises ValueError if the file is missing or damaged."""
    try:
        content = parse_json(path.read_bytes())
        scores = {name: values["f1"] for name, values in content["dataset_tasks"].items()}
    except FileNotFoundError:
        raise ValueError(f"{path.name}: missing; the run has not ended or has no test split") from None
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path.name}: damaged, not JSON with scores by dataset task") from None
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path.name}: damaged, the F1 of {name} is {value!r}")
    return {name: float(value) for name, value in scores.items()}


def trained_parameters(run: Path) -> int | None:
    """Count the parameters in a run's adapter from the header of its file; None without a readable file."""
    try:
        with safe_open(run / WEIGHTS, framework="numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _read(run: Path) -> _Run:
    if not (run / "config.yaml").is_file():
        raise UserError("not a run directory, it has no config.yaml")
    return _Run(run, read_config(run / "config.yaml"), read_scores(run / "scores.json"))


def _columns(runs: Iterable[_Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.scores))


def _table(
    runs: Iterable[_Run], columns: list[str], common: Callable[[TrainConfig], dict[str, Any]], notes: list[str]
) -> RunTable:
    """Group runs whose ``common`` settings are equal. A second run with the same seed gets a row of its own."""
    rows: list[Row] = []
    for run in runs:
        scores = {name: run.scores[name] for name in columns if name in run.scores}
        if len(scores) == len(columns):
            scores[ALL] = sum(scores.values())
        settings, seed = common(run.config), run.config.seed
        row = next((row for row in rows if row.settings == settings and seed not in row.scores), None)
        if row is None:
            row = Row(run.name, run.config, settings, {}, [], trained_parameters(run.directory))
            rows.append(row)
        row.scores[seed] = scores
        row.runs.append(run.directory)
    return RunTable(rows, columns, notes=notes)


def _find(rows: list[Row], reference: Path) -> Row:
    for row in rows:
        if reference.resolve() in [run.resolve() for run in row.runs]:
            return row
    shown = ", ".join(str(row.runs[0]) for row in rows)
    raise UserError(f"--reference {reference}: not among the runs in the table. Choose one of: {shown}.")


def _missing(table: RunTable, known: list[str]) -> list[str]:
    notes = []
    for row in table.rows:
        missing = [name for name in table.dataset_tasks if row.mean(name) is None]
        if missing:
            notes.append(f"no All for {row.name or 'the runs'}: it has no scores of {', '.join(missing)}")
    dropped = [name for name in known if name not in table.dataset_tasks]
    return notes + ([f"not shown and not part of All: {', '.join(dropped)}"] if dropped else [])
