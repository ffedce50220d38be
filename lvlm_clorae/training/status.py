"""``status.json`` of a run directory: whether the run goes on, how far it is, and what it failed of.

    {"state": "running", "message": null, "step": 120, "epoch": 2, "time": "2026-11-25T15:03:01+00:00",
     "host": "node-1", "pid": 4711, "job": "1234_5", "rank": 0, "traceback": null}

``state`` is running, interrupted, failed or done. A run that is killed leaves "running" with an old time.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lvlm_clorae.files import write_text_atomic

STATUS = "status.json"
STATES = ("running", "interrupted", "failed", "done")
PULSE_SECONDS = 20.0


def slurm_job() -> str | None:
    """The SLURM job that this is, ``ARRAY_TASK`` in an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def read_status(path: Path) -> dict[str, Any]:
    """The content of a ``status.json``; empty where it is missing, damaged or of an unknown state."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("state") not in STATES:
        return {}
    if not isinstance(content.get("message"), str):
        content["message"] = None
    return content


class Status:
    """Rank 0 tells where the run is; whichever rank fails first tells why.

    Args:
        directory: the run directory
        rank: this rank
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._path, self._rank = directory / STATUS, rank
        self._where = {"step": 0, "epoch": 0}
        self._written = 0.0

    def start(self) -> None:
        """Forget what an earlier attempt left. Before any other rank may fail."""
        if self._rank == 0:
            self._write("running")

    def reached(self, step: int, epoch: int) -> None:
        """Optimizer steps and whole epochs done."""
        self._where = {"step": step, "epoch": epoch}
        self.pulse()

    def pulse(self) -> None:
        """A sign of life; written every ``PULSE_SECONDS``."""
        if self._rank == 0 and time.monotonic() - self._written > PULSE_SECONDS:
            with suppress(OSError):  # a full disk is for the next checkpoint to tell
                self._write("running")

    def end(self, state: str, message: str | None = None) -> None:
        """done or interrupted."""
        if self._rank == 0:
            self._write(state, message)

    def fail(self, message: str, traceback: str | None = None) -> bool:
        """Tell of this rank's failure. False where another rank failed before, of which this one is a consequence."""
        if read_status(self._path).get("state") == "failed":
            return False
        with suppress(OSError):  # a full disk may be what it failed of
            self._write("failed", message, traceback)
        return True

    def _write(self, state: str, message: str | None = None, traceback: str | None = None) -> None:
        self._written = time.monotonic()
        content: dict[str, Any] = {"state": state, "message": message, **self._where}
        content["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content |= {"host": socket.gethostname(), "pid": os.getpid(), "job": slurm_job(), "rank": self._rank}
        content["traceback"] = traceback
        write_text_atomic(self._path, json.dumps(content) + "\n")
