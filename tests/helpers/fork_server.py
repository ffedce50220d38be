"""Start training runs quickly: a process that has imported everything forks a rank on request.

A rank is a separate process with its own process group and may be killed; only the imports are shared. The protocol is
a JSON object a line on standard input: a start request returns the process id, ``{"wait": pid}`` the exit code.
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

from tests.helpers.launch import REPOSITORY, environment, free_port

TIMEOUT = 600.0  # seconds after which a rank counts as hanging


class ForkServer:
    """Client of the server process. Use as a context manager, which kills ranks that still run at its end."""

    def __init__(self) -> None:
        line = [sys.executable, "-m", "tests.helpers.fork_server"]
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
        """Start ``train.py`` on ``ranks`` ranks and return their process ids.

        Args:
            log: file that their output is appended to
            fault: a function of tests/helpers/faults.py that every rank calls first
        """
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        common = {"argv": list(map(str, arguments)), "log": str(log), "fault": fault}
        requests = [{"environment": each, **common} for each in environments]
        pids = [self._ask(request) for request in requests]
        self._running.update(pids)
        return pids

    def run(self, ranks: int, directory: Path, *arguments: object, stage: int = 2, code: int = 0, **more: Any) -> str:
        """Run ``train.py`` to its end with ``directory`` as the run directory; return its output.

        Args:
            code: the exit code that all ranks must have
        """
        log = directory.with_name(f"{directory.name}.log")
        config = directory.with_name(f"zero{stage}.json") if stage == 1 else REPOSITORY / f"ds_configs/zero{stage}.json"
        if stage == 1:
            config.write_text('{"zero_optimization": {"stage": 1}}')
        pids = self.start(ranks, log, "--deepspeed", config, "--output_dir", directory, *arguments, **more)
        assert [self.wait(pid) for pid in pids] == [code] * ranks, log.read_text()
        return log.read_text()

    def kill(self, pid: int) -> None:
        """Kill a rank."""
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def wait(self, pid: int) -> int:
        """Wait for a rank and return its exit code, or minus the signal that killed it.

        A rank that hangs prints its stack to the log and is killed.
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
    """Return the number of records in the run's metrics."""
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_records(directory: Path, count: int, log: Path) -> None:
    """Wait until a run has written ``count`` records."""
    _wait(lambda: count_records(directory) >= count, log)


def wait_for_status(directory: Path, started: float, log: Path) -> None:
    """Wait until the ranks of a run that was started at time ``started`` have connected and written the status."""
    path = directory / "status.json"
    _wait(lambda: path.exists() and path.stat().st_mtime > started, log)


def _wait(reached: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def _become_rank(request: dict[str, Any]) -> None:
    from lvlm_clorae.training.main import entry
    from tests.helpers import faults

    os.environ.update(request["environment"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["train.py", *request["argv"]]
    if request["fault"]:
        getattr(faults, request["fault"])()
    try:
        entry()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))


def _wait_for_rank(pid: int) -> int:
    deadline = time.monotonic() + TIMEOUT
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
    os.dup2(2, 1)  # imports print to standard output

    import deepspeed
    import transformers

    import lvlm_clorae.training.evaluation
    import lvlm_clorae.training.export
    import lvlm_clorae.training.loop  # noqa: F401

    transformers.T5ForConditionalGeneration, deepspeed.DeepSpeedEngine  # noqa: B018 - lazy imports
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
