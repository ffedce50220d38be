"""How a point stands, from the files in its run directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_clorae.errors import UserError
from lvlm_clorae.sweep.points import Point
from lvlm_clorae.training.run_directory import find_run
from lvlm_clorae.training.status import STATUS, read_status

STATES = ("done", "running", "interrupted", "failed", "waiting", "foreign")
"""``foreign``: the directory holds something else, as after a change of the sweep's settings."""
TO_START = ("waiting", "interrupted", "failed")
STALE_AFTER = 30.0
"""Minutes without a sign of life after which a run that says it is running is taken for one that was killed."""
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Standing:
    """How a point stands.

    Args:
        state: one of :data:`STATES`
        step, epoch: the optimizer step and epoch that the run says it has reached
        dev_all: the last sum of dev F1
        age: seconds since the run last wrote something
        error: one line: why it failed, or what the directory holds instead
    """

    state: str
    step: int | None = None
    epoch: int | None = None
    dev_all: float | None = None
    age: float | None = None
    error: str | None = None


def standings(points: Iterable[Point], stale_after: float = STALE_AFTER) -> list[Standing]:
    """How each point stands. ``squeue`` is asked once, where there is one.

    Args:
        stale_after: minutes, see :data:`STALE_AFTER`
    """
    jobs = listed_jobs()
    return [standing(point, jobs, stale_after) for point in points]


def standing(point: Point, jobs: Set[str] = frozenset(), stale_after: float = STALE_AFTER) -> Standing:
    """How a point stands. Damaged and missing files are no error: what they would say is then unknown.

    Args:
        jobs: the jobs that are in SLURM's queue
    """
    directory = point.directory
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return Standing("waiting")
    try:
        find_run(point.config)
    except UserError as error:
        return Standing("foreign", error=first_line(str(error)))
    status = read_status(directory / STATUS)
    records = list(_metrics(directory / METRICS))
    state = _state(point, status, jobs, stale_after)
    return Standing(
        state,
        step=_reached("step", status, records),
        epoch=_reached("epoch", status, records),
        dev_all=_last_dev(records),
        age=_age(directory),
        error=first_line(status.get("message") or "") or None if state == "failed" else None,
    )


def has_ended(point: Point) -> bool:
    """Whether the run wrote what it writes last (``_finish`` in training/main.py)."""
    last = "scores.json" if point.config.adapter == "none" else "adapter/schema.json"
    return (point.directory / last).is_file()


def listed_jobs() -> frozenset[str]:
    """The user's jobs in SLURM's queue, by number and, of an array, by ``array_task``; none where there is no SLURM."""
    if shutil.which("squeue") is None:
        return frozenset()
    command = ["squeue", "--me", "--noheader", "--array", "--format=%A %i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(done.stdout.split()) if done.returncode == 0 else frozenset()


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _state(point: Point, status: dict[str, Any], jobs: Set[str], stale_after: float) -> str:
    if has_ended(point):
        return "done"
    if status.get("state") in ("failed", "interrupted"):
        return str(status["state"])
    if status.get("state") == "done":
        return "interrupted"  # but what it wrote last is gone, or was never there
    job = status.get("job")
    if job is not None and str(job) in jobs:
        return "running"
    age = _age(point.directory)
    return "running" if age is not None and age <= 60 * stale_after else "interrupted"


def _age(directory: Path) -> float | None:
    """Seconds since the newest sign of life; 0 where the file server's clock is ahead."""
    times = []
    for name in (STATUS, METRICS, "config.yaml"):  # the last is written first, before a weight is loaded
        try:
            times.append((directory / name).stat().st_mtime)
        except OSError:
            continue
    return max(0.0, time.time() - max(times)) if times else None


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a line that a kill cut off
            continue
        if isinstance(record, dict):
            yield record


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
