"""Signal handling."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import REPOSITORY, environment

pytestmark = pytest.mark.integration

LISTENER = """
import os, signal, sys
from lvlm_clorae.training import preemption
preemption.listen()
assert not preemption.stop_requested()
os.kill(os.getpid(), int(sys.argv[1]))
assert preemption.stop_requested()
if len(sys.argv) > 2:
    os.kill(os.getpid(), int(sys.argv[1]))
print("alive; torch is", "torch" in sys.modules)
"""


def listen(*arguments: int) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", LISTENER, *map(str, map(int, arguments))]
    settings = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(line, env=settings, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_a_flag(number: int) -> None:
    done = listen(number)
    assert (done.returncode, done.stdout) == (0, "alive; torch is False\n"), done.stderr


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGUSR1, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_second_ctrl_c_stops_the_process(number: int, ends: bool) -> None:
    done = listen(number, 1)
    assert (done.returncode != 0) == ends
    assert ("KeyboardInterrupt" in done.stderr) == ends


def test_sigusr2_prints_the_stack() -> None:
    program = LISTENER.replace("assert preemption.stop_requested()\n", "")
    line = [sys.executable, "-c", program, str(int(signal.SIGUSR2))]
    settings = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(line, env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "most recent call first" in done.stderr


@pytest.mark.slow
def test_a_stop_request_before_the_first_step(tmp_path: Path) -> None:
    """The signal arrives while Python starts or the model loads."""
    from tests.helpers.launch import command, small_shards

    shards = small_shards(tmp_path / "shards")
    line = command(1, "--deepspeed", REPOSITORY / "ds_configs/zero2.json", "--output_dir", tmp_path / "run")
    process = subprocess.Popen(
        [*line, "--shards", shards], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    status = Path(f"/proc/{process.pid}/status")
    while not int(_field(status, "SigCgt"), 16) >> (signal.SIGUSR1 - 1) & 1:  # the handlers are installed
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 75, errors
    assert "--resume_from_checkpoint auto" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def _field(status: Path, name: str) -> str:
    return next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name))
