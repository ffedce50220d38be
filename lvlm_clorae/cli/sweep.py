"""``lvlm-clorae sweep``: expand a sweep file, report its state, collect its scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_clorae.arguments import Parser
from lvlm_clorae.console import make_console
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import file_errors

if TYPE_CHECKING:
    from lvlm_clorae.sweep.expand import Sweep, SweepRun
    from lvlm_clorae.sweep.status import RunStatus


def main(argv: list[str]) -> int:
    """Run a sub-command of ``sweep``."""
    parser = Parser(prog="lvlm-clorae sweep", description="Run and compare many settings and seeds from one file.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    expand = commands.add_parser(
        "expand",
        help="list the runs of a sweep, or print the arguments of one",
        description="List the runs of a sweep and the sbatch command that submits the unfinished ones. With --index: "
        "print the arguments of train.py for that run, one per line, and nothing if it is done.",
    )
    status = commands.add_parser("status", help="print the status of each run")
    collect = commands.add_parser(
        "collect",
        help="collect the scores of all finished runs in one table",
        description="Print mean and standard deviation over seeds, and write them to sweep.csv and sweep.json in the "
        "directory of the sweep, with plots.",
    )
    for command, function in ((expand, _expand), (status, _status), (collect, _collect)):
        command.add_argument("file", type=Path, metavar="FILE", help="sweep file (docs/sweeps.md)")
        command.add_argument(
            "--stale_after",
            type=float,
            default=30.0,
            metavar="MINUTES",
            help="time without an update after which a run that is not in SLURM's queue counts as killed (default: 30)",
        )
        command.set_defaults(command=function)
    expand.add_argument("--index", type=int, metavar="N", help="print the arguments of this run")
    for command in (expand, status):
        command.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    return int(arguments.command(arguments))


def _read(arguments: argparse.Namespace) -> tuple[Sweep, list[RunStatus]]:
    from lvlm_clorae.sweep.expand import read_sweep
    from lvlm_clorae.sweep.status import run_statuses

    sweep = read_sweep(arguments.file)
    return sweep, run_statuses(sweep.sweep_runs, arguments.stale_after)


def _expand(arguments: argparse.Namespace) -> int:
    if arguments.index is not None:
        return _expand_sweep_run(arguments)
    from lvlm_clorae.sweep.status import array_indices, submit_command

    sweep, statuses = _read(arguments)
    array = array_indices(statuses)
    line = submit_command(sweep, array)
    pairs = list(zip(sweep.sweep_runs, statuses, strict=True))
    if arguments.json:
        sweep_runs = [{**_about(run), "settings": run.varied, "state": its.state} for run, its in pairs]
        print(json.dumps({"sweep_runs": sweep_runs, "array": array, "sbatch": line}, indent=1))
        return 0
    _print(["number", "sweep_run", "state"], [(run.number, run.name, its.state) for run, its in pairs])
    _summarize(sweep, statuses)
    print(line or "nothing is left to be started")
    return 0


def _expand_sweep_run(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.sweep.expand import read_sweep, write_arguments
    from lvlm_clorae.sweep.status import run_statuses
    from lvlm_clorae.training.run_directory import slurm_job

    sweep = read_sweep(arguments.file)
    if not 0 <= arguments.index < len(sweep.sweep_runs):
        raise UserError(f"{sweep.path}: has the runs 0 to {len(sweep.sweep_runs) - 1}; there is no {arguments.index}.")
    sweep_run = sweep.sweep_runs[arguments.index]
    [its] = run_statuses([sweep_run], arguments.stale_after)
    if its.state == "foreign":
        raise UserError(f"run {sweep_run.number} of {sweep.path}: {its.error}")
    if its.state == "running" and its.job != slurm_job():
        where = f" in job {its.job}" if its.job else ""
        raise UserError(
            f"run {sweep_run.number} of {sweep.path} is running{where}. Wait until it ends; if it was killed, give "
            "--stale_after 0."
        )
    words = [] if its.state == "done" else write_arguments(sweep_run)
    print(f"run {sweep_run.number}, {sweep_run.name}: {its.state}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({**_about(sweep_run), "state": its.state, "arguments": words}, indent=1))
    else:
        print("".join(f"{word}\n" for word in words), end="")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    sweep, statuses = _read(arguments)
    pairs = list(zip(sweep.sweep_runs, statuses, strict=True))
    if arguments.json:
        sweep_runs = [{**_about(run), **vars(its)} for run, its in pairs]
        print(json.dumps({"sweep_runs": sweep_runs, "states": _counts(statuses)}, indent=1))
        return 0
    rows = []
    for run, its in pairs:
        dev_all = None if its.dev_all is None else f"{its.dev_all:.1f}"
        age = None if its.age is None else _spoken(its.age)
        rows.append((run.number, run.name, its.state, its.epoch, its.step, dev_all, age, its.error))
    _print(["number", "sweep_run", "state", "epoch", "step", "dev All", "last sign", "error"], rows)
    _summarize(sweep, statuses)
    return 0


def _collect(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.analysis.compare import collect
    from lvlm_clorae.analysis.tables import sheets, write_sweep

    sweep, statuses = _read(arguments)
    found = collect(sweep, statuses)
    make_console().print(*(sheets(found) if found.rows else ()))
    for run in found.unfinished:
        print(f"left out: {run['number']} {run['name']} ({run['state']})")
    for note in found.notes:
        print(note)
    if not found.rows:
        print("there are no scores yet, and nothing is written")
        return 0
    with file_errors(f"{sweep.output_dir}: cannot be written"):
        print("written:", *write_sweep(sweep, found))
    return 0


def _about(sweep_run: SweepRun) -> dict[str, Any]:
    return {"number": sweep_run.number, "name": sweep_run.name, "directory": str(sweep_run.directory)}


def _print(columns: list[str], rows: Iterable[Iterable[object]]) -> None:
    from lvlm_clorae.analysis.tables import Sheet

    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    make_console().print(Sheet("", columns, cells, left=len(columns)))


def _summarize(sweep: Sweep, found: list[RunStatus]) -> None:
    counts = ", ".join(f"{count} {state}" for state, count in _counts(found).items() if count)
    print(f"{len(found)} runs: {counts}; in {sweep.output_dir}")
    foreign = next((its.error for its in found if its.state == "foreign"), None)
    if foreign:
        print(f"foreign: {foreign}")


def _counts(found: list[RunStatus]) -> dict[str, int]:
    from lvlm_clorae.sweep.status import STATES

    counts = Counter(its.state for its in found)
    return {state: counts[state] for state in STATES}


def _spoken(seconds: float) -> str:
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"
