"""Report the state of each run of a sweep, from its run directory and SLURM's queue, and submit what is left."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_clorae.errors import UserError, first_line
from lvlm_clorae.sweep.expand import Sweep, SweepRun
from lvlm_clorae.training.run_directory import STATUS, find_run, last_file, read_status

STATES = ("done", "running", "interrupted", "failed", "waiting", "foreign")
"""``foreign``: the directory holds something else, for example after the sweep's settings have changed."""
TO_START = ("waiting", "interrupted", "failed")
BATCH_SCRIPT = "slurm/sweep.sbatch"
STALE_AFTER = 30.0  # minutes without a write after which a run that claims to be running counts as killed
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RunStatus:
    """Status of a run."""

    state: str  # one of STATES
    step: int | None = None  # reached, as is the epoch
    epoch: int | None = None
    dev_all: float | None = None  # last sum of dev F1 over the dataset tasks [%]
    age: float | None = None  # since the run last wrote a file [s]
    error: str | None = None  # one line: why the run failed, or what the directory holds instead
    job: str | None = None  # of SLURM, in which the run last started


def run_statuses(sweep_runs: Iterable[SweepRun], stale_after: float = STALE_AFTER) -> list[RunStatus]:
    """Report the status of each run. ``squeue`` is called once, if there is one."""
    jobs = listed_jobs()
    return [run_status(sweep_run, jobs, stale_after) for sweep_run in sweep_runs]


def run_status(sweep_run: SweepRun, jobs: Set[str] | None = None, stale_after: float = STALE_AFTER) -> RunStatus:
    """Report the status of a run. Values in damaged or missing files are unknown, not an error.

    ``jobs`` are those in SLURM's queue, None if that is unknown; ``stale_after`` is in minutes.
    """
    directory = sweep_run.directory
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return RunStatus("waiting")
    try:
        find_run(sweep_run.config)
    except UserError as error:
        return RunStatus("foreign", error=first_line(error))
    status = read_status(directory / STATUS)
    records = _metrics(directory / METRICS)
    state = _state(sweep_run, status, jobs, stale_after)
    return RunStatus(
        state,
        step=_reached("step", status, records),
        epoch=_reached("epoch", status, records),
        dev_all=_last_dev(records),
        age=_age(directory),
        error=first_line(status["message"]) if state == "failed" and status.get("message") else None,
        job=str(status["job"]) if status.get("job") else None,
    )


def listed_jobs(pauses: Iterable[float] = (1, 4, 0)) -> frozenset[str] | None:
    """The user's jobs in SLURM's queue, by number and, for an array, by ``array_task``.

    None without SLURM, and if ``squeue`` keeps failing, which is printed.
    """
    if shutil.which("squeue") is None:
        return None
    command, reason = ["squeue", "--me", "--noheader", "--array", "--format=%A %i"], ""
    for pause in pauses:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            if done.returncode == 0:
                return frozenset(done.stdout.split())
            reason = first_line(done.stderr or f"exit code {done.returncode}")
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = first_line(error)
        time.sleep(pause)
    print(f"squeue fails ({reason}): whether runs are running is judged by the age of their files", file=sys.stderr)
    return None


def _state(sweep_run: SweepRun, status: dict[str, Any], jobs: Set[str] | None, stale_after: float) -> str:
    if (sweep_run.directory / last_file(sweep_run.config)).is_file():
        return "done"
    if status.get("state") in ("failed", "interrupted"):
        return str(status["state"])
    if status.get("state") == "done":
        return "interrupted"  # its last file was removed or never written
    if status.get("job") and jobs is not None:
        return "running" if str(status["job"]) in jobs else "interrupted"
    age = _age(sweep_run.directory)
    return "running" if age is not None and age <= 60 * stale_after else "interrupted"


def _age(directory: Path) -> float | None:
    """Seconds since the last write; 0 if the file server's clock is ahead."""
    times = []
    for name in (STATUS, METRICS, "config.yaml"):  # config.yaml is written first, before weights are loaded
        with suppress(OSError):
            times.append((directory / name).stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else None


def _metrics(path: Path) -> list[dict[str, Any]]:
    records, lines = [], []
    with suppress(OSError):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        with suppress(ValueError, RecursionError):  # the last line of a killed run may be incomplete
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def _reached(name: str, status: dict[str, Any], records: list[dict[str, Any]]) -> int | None:
    for source in (status, *reversed(records)):
        value = source.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _last_dev(records: list[dict[str, Any]]) -> float | None:
    for record in reversed(records):
        f1 = record.get("f1")
        if record.get("kind") == "dev" and isinstance(f1, dict):
            return float(sum(value for value in f1.values() if isinstance(value, int | float)))
    return None


def array_indices(statuses: Iterable[RunStatus]) -> str:
    """The runs that are to be started, as SLURM's ``--array`` takes them; empty if there are none."""
    return ranges(n for n, status in enumerate(statuses) if status.state in TO_START)


def submit_command(sweep: Sweep, array: str) -> str:
    """The shell command that submits these runs; empty if there are none."""
    return f"sbatch --array={array} {BATCH_SCRIPT} {shlex.quote(str(sweep.path))}" if array else ""


def ranges(numbers: Iterable[int]) -> str:
    """Format ascending numbers as ranges: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
