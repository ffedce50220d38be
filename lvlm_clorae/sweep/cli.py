"""``lvlm-clorae sweep``: the parser, and what its commands print. The rooms below are imported when one runs."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_clorae.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from lvlm_clorae.sweep.collect import Collected
    from lvlm_clorae.sweep.points import Point, Sweep
    from lvlm_clorae.sweep.standing import Standing

BATCH_SCRIPT = "slurm/sweep.sbatch"


def add_sweep(commands: Any) -> None:
    """Give the parser of ``lvlm-clorae`` the command ``sweep``."""
    sweep = commands.add_parser("sweep", help="many runs from one file: their arguments, state and scores")
    sweep = sweep.add_subparsers(metavar="COMMAND", required=True)
    expand = sweep.add_parser(
        "expand",
        help="list the points of a sweep, or print the arguments of one",
        description="List the points and the line that submits those which are left. With --index: print the arguments "
        "of train.py for that point, a line each, and nothing where it is done.",
    )
    status = sweep.add_parser("status", help="how each point stands")
    collect = sweep.add_parser(
        "collect",
        help="the scores of all finished points in one table",
        description="Mean and standard deviation over seeds, printed and written to sweep.csv and sweep.json "
        "in the sweep's directory, All and each dataset's F1 drawn in sweep.png and sweep-units.png.",
    )
    for command, function in ((expand, _expand), (status, _status), (collect, _collect)):
        command.add_argument("file", type=Path, metavar="FILE", help="the sweep (docs/sweeps.md)")
        command.add_argument(
            "--stale-after",
            type=float,
            default=30.0,
            metavar="MINUTES",
            help="a run without a sign of life for so long, and not in SLURM's queue, was killed (30)",
        )
        command.set_defaults(command=function)
    expand.add_argument("--index", type=int, metavar="N", help="print the arguments of this point")
    expand.add_argument("--json", action="store_true", help="print it as JSON")
    status.add_argument("--json", action="store_true", help="print it as JSON")


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as SLURM's ``--array`` takes them: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _read(arguments: argparse.Namespace) -> tuple[Sweep, list[Standing]]:
    from lvlm_clorae.sweep.points import read_sweep
    from lvlm_clorae.sweep.standing import standings

    sweep = read_sweep(arguments.file)
    return sweep, standings(sweep.points, arguments.stale_after)


def _expand(arguments: argparse.Namespace) -> int:
    if arguments.index is not None:
        return _expand_point(arguments)
    from lvlm_clorae.sweep.standing import TO_START

    sweep, found = _read(arguments)
    array = ranges(point.number for point, its in zip(sweep.points, found, strict=True) if its.state in TO_START)
    line = f"sbatch --array={array} {BATCH_SCRIPT} {shlex.quote(str(sweep.path))}" if array else ""
    if arguments.json:
        points = [
            {**_about(point), "settings": point.varied, "state": its.state}
            for point, its in zip(sweep.points, found, strict=True)
        ]
        print(json.dumps({"points": points, "array": array, "sbatch": line}, indent=1))
        return 0
    rows = [(point.number, point.name, its.state) for point, its in zip(sweep.points, found, strict=True)]
    _print(_table(("number", "point", "state"), rows))
    _summarise(sweep, found)
    print(line or "nothing is left to be started")
    return 0


def _expand_point(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.sweep.points import read_sweep
    from lvlm_clorae.sweep.standing import standings

    sweep = read_sweep(arguments.file)
    if not 0 <= arguments.index < len(sweep.points):
        raise UserError(f"{sweep.path}: has the points 0 to {len(sweep.points) - 1}; there is no {arguments.index}.")
    point = sweep.points[arguments.index]
    [its] = standings([point], arguments.stale_after)
    if its.state == "foreign":
        raise UserError(f"point {point.number} of {sweep.path}: {its.error}")
    words = [] if its.state == "done" else point.write_arguments()
    print(f"point {point.number}, {point.name}: {its.state}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({**_about(point), "state": its.state, "arguments": words}, indent=1))
    else:
        print("".join(f"{word}\n" for word in words), end="")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    sweep, found = _read(arguments)
    if arguments.json:
        points = [{**_about(point), **vars(its)} for point, its in zip(sweep.points, found, strict=True)]
        print(json.dumps({"points": points, "states": _counts(found)}, indent=1))
        return 0
    rows = [
        (
            point.number,
            point.name,
            its.state,
            *("" if value is None else value for value in (its.epoch, its.step)),
            "" if its.dev_all is None else f"{its.dev_all:.1f}",
            "" if its.age is None else _spoken(its.age),
            its.error or "",
        )
        for point, its in zip(sweep.points, found, strict=True)
    ]
    columns = ("number", "point", "state", "epoch", "step", "dev All", "last sign", "error")
    _print(_table(columns, rows))
    _summarise(sweep, found)
    return 0


def _collect(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.sweep.collect import collect
    from lvlm_clorae.sweep.report import write

    sweep, standings = _read(arguments)
    found = collect(sweep, standings)
    if found.rows:
        _print(_scores(found))
    for number, name, state in found.unfinished:
        print(f"not in the table: {number} {name} ({state})")
    for problem in found.problems:
        print(f"not in the table: {problem}")
    if not found.rows:
        print("there are no scores yet, and nothing is written")
        return 0
    try:
        paths = write(sweep, found)
    except OSError as error:
        raise UserError(f"{sweep.output}: cannot be written ({error.strerror}).") from None
    print("written:", *paths)
    return 0


def _about(point: Point) -> dict[str, Any]:
    return {"number": point.number, "name": point.name, "directory": str(point.directory)}


def _scores(found: Collected) -> Table:
    from lvlm_clorae.sweep.collect import spelt

    rows = []
    for row in found.rows:
        cells = []
        for name in found.names:
            mean, sd = row.mean(name), row.sd(name)
            cells.append("" if mean is None else f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}"))
        rows.append((*(spelt(row.settings[key]) for key in found.keys), len(row.scores), *cells))
    return _table((*found.keys, "seeds", *found.names), rows)


def _table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)  # a log has no width of its own


def _summarise(sweep: Sweep, found: list[Standing]) -> None:
    counts = ", ".join(f"{count} {state}" for state, count in _counts(found).items() if count)
    print(f"{len(found)} points: {counts}; in {sweep.output}")
    foreign = next((its.error for its in found if its.state == "foreign"), None)
    if foreign:
        print(f"foreign: {foreign}")


def _counts(found: list[Standing]) -> dict[str, int]:
    from lvlm_clorae.sweep.standing import STATES

    counts = Counter(its.state for its in found)
    return {state: counts[state] for state in STATES}


def _spoken(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
