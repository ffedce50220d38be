"""Signals: a flag at the first, and what each of them leaves alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import REPOSITORY, environment

LISTENER = """
import os, signal, sys
from lvlm_clorae.training import preemption
preemption.listen()
assert not preemption.wished()
os.kill(os.getpid(), int(sys.argv[1]))
assert preemption.wished()
if len(sys.argv) > 2:
    os.kill(os.getpid(), int(sys.argv[1]))
print("lives on; torch is", "torch" in sys.modules)
"""


def listen(*arguments: int) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", LISTENER, *map(str, map(int, arguments))]
    settings = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(line, env=settings, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_a_flag(number: int) -> None:
    done = listen(number)
    assert (done.returncode, done.stdout) == (0, "lives on; torch is False\n"), done.stderr


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGUSR1, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_second_ctrl_c_ends_it_at_once(number: int, ends: bool) -> None:
    done = listen(number, 1)
    assert (done.returncode != 0) == ends
    assert ("KeyboardInterrupt" in done.stderr) == ends


def test_sigusr2_shows_where_a_job_hangs() -> None:
    program = LISTENER.replace("assert preemption.wished()\n", "")
    line = [sys.executable, "-c", program, str(int(signal.SIGUSR2))]
    settings = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(line, env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "most recent call first" in done.stderr


@pytest.mark.slow
def test_told_to_stop_before_the_first_step(tmp_path: Path) -> None:
    """From the first moments of Python to the end of loading the model."""
    from tests.launch import command, small_shards

    shards = small_shards(tmp_path / "shards")
    line = command(1, "--deepspeed", REPOSITORY / "ds_configs/zero2.json", "--output", tmp_path / "run")
    process = subprocess.Popen(
        [*line, "--shards", shards], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    status = Path(f"/proc/{process.pid}/status")
    while not int(_field(status, "SigCgt"), 16) >> (signal.SIGUSR1 - 1) & 1:  # it listens
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 75, errors
    assert "interrupted: before the model was loaded" in errors
    assert "--resume auto goes on" in errors
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def _field(status: Path, name: str) -> str:
    return next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name))
