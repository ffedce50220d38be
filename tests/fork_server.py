"""Starts many runs in little time: a process that has imported everything forks a rank whenever it is asked to.

A rank is a process of its own with a fresh process group, and may be killed; only the imports are shared. One JSON
object a line on standard input starts a rank, and its process id is answered; ``{"wait": pid}`` answers its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch import REPOSITORY, environment, free_port

PATIENCE = 600.0  # seconds: a rank that takes longer hangs


class ForkServer:
    """The other end. Use as a context manager; ranks that still run at its end are killed."""

    def __init__(self) -> None:
        line = [sys.executable, "-m", "tests.fork_server"]
        settings = {**environment(), "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            line, cwd=REPOSITORY, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._running: set[int] = set()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in list(self._running):
            self.kill(pid)
        self._process.communicate()

    def start(self, ranks: int, log: Path, *arguments: object, fault: str | None = None) -> list[int]:
        """Start the job on so many ranks, whose output goes to ``log``; returns their process ids.

        Args:
            fault: a function of tests/faults.py, which every rank calls first
        """
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        ways = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        same = {"argv": list(map(str, arguments)), "log": str(log), "fault": fault}
        asked = [{"environment": way, **same} for way in ways]
        pids = [self._ask(request) for request in asked]
        self._running.update(pids)
        return pids

    def kill(self, pid: int) -> None:
        """End a rank that does not end by itself."""
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def wait(self, pid: int) -> int:
        """The exit code; minus the signal of a rank that was killed.

        One that does not end says into its log where it hangs, and is killed.
        """
        self._running.discard(pid)
        return self._ask({"wait": pid})

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def count_records(directory: Path) -> int:
    """How many records the run's metrics have."""
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_records(directory: Path, count: int, log: Path) -> None:
    """Return once a run has written so many."""
    _wait(lambda: count_records(directory) >= count, log)


def wait_for_status(directory: Path, started: float, log: Path) -> None:
    """Return once the ranks of a run that was started at that time have met: the first has then said that it runs."""
    path = directory / "status.json"
    _wait(lambda: path.exists() and path.stat().st_mtime > started, log)


def _wait(reached: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def _become_rank(request: dict[str, Any]) -> None:
    from lvlm_clorae.training.main import entry
    from tests import faults

    os.environ.update(request["environment"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.argv = ["train.py", *request["argv"]]
    if request["fault"]:
        getattr(faults, request["fault"])()
    try:
        entry()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))


def _wait_for_rank(pid: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGUSR2)
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # imports speak

    import deepspeed
    import transformers

    import lvlm_clorae.training.evaluation
    import lvlm_clorae.training.export
    import lvlm_clorae.training.loop  # noqa: F401

    transformers.T5ForConditionalGeneration, deepspeed.DeepSpeedEngine  # noqa: B018 - both import lazily
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(_wait_for_rank(request["wait"]), file=answers)
            continue
        pid = os.fork()
        if pid == 0:
            _become_rank(request)
        print(pid, file=answers)


if __name__ == "__main__":
    _serve()
