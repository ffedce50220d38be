"""Start training runs quickly: a process that has imported everything forks a rank on request.

A rank is a separate process with its own process group and may be killed; only the imports are shared. The protocol is
a JSON object a line on standard input: a start request returns the process id, ``{"wait": pid}`` the exit code. The
deepspeed launcher is tested by what uses tests/helpers/launch.py.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.launch import REPOSITORY, environment, free_port

TIMEOUT = 600.0  # seconds after which a rank counts as hanging


class ForkServer:
    """Client of the server process."""

    def __init__(self) -> None:
        line = [sys.executable, "-m", "tests.helpers.fork_server"]
        settings = {**environment(), "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            line, cwd=REPOSITORY, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._running: set[int] = set()

    def close(self) -> None:
        """Kill the ranks that still run, and end the server."""
        for pid in list(self._running):
            self.kill(pid)
        self._process.communicate()

    def start(
        self, ranks: int, log: Path, *arguments: object, script: str | None = None, fault: str | None = None
    ) -> list[int]:
        """Start ``train.py`` on ``ranks`` ranks and return their process ids.

        Args:
            log: file that their output is appended to
            script: path of another script to run instead
            fault: a function of tests/helpers/faults.py that every rank calls first
        """
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        environments = [
            {**environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
        ]
        common = {"argv": list(map(str, arguments)), "log": str(log), "script": script, "fault": fault}
        common["folder"] = os.getcwd()
        requests = [{"environment": each, **common} for each in environments]
        pids = [self._ask(request) for request in requests]
        self._running.update(pids)
        return pids

    def run(
        self,
        ranks: int,
        directory: Path,
        *arguments: object,
        stage: int = 2,
        code: int = 0,
        log: Path | None = None,
        **more: Any,
    ) -> str:
        """Run ``train.py`` to its end with ``directory`` as the run directory; return its output.

        Args:
            code: the exit code that all ranks must have
            log: file that their output is appended to, by default beside the run directory
        """
        log = log or directory.with_name(f"{directory.name}.log")
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


@functools.cache
def shared_server() -> ForkServer:
    """Return the server of this test process, which starts at the first call."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def train(directory: Path, ranks: int, *arguments: object, stage: int = 2) -> str:
    """Run the job to its end with ``directory`` as the run directory; return its output."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        return shared_server().run(ranks, directory, *arguments, stage=stage, log=log)


def two_ranks(script: str, argument: Path) -> None:
    """Run a script of tests/distributed on two ranks to its end."""
    with tempfile.TemporaryDirectory() as folder:
        server, log = shared_server(), Path(folder) / "log"
        pids = server.start(2, log, argument, script=str(REPOSITORY / "tests/distributed" / script))
        assert [server.wait(pid) for pid in pids] == [0, 0], log.read_text()


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

    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        if request["script"]:
            sys.argv = [request["script"], *request["argv"]]
            runpy.run_path(request["script"], run_name="__main__")
            raise SystemExit(0)
        sys.argv = ["train.py", *request["argv"]]
        if request["fault"]:
            getattr(faults, request["fault"])()
        entry()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
