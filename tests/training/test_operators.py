"""DeepSpeed's operators are compiled while signals to stop are answered."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest

from lvlm_clorae.training import operators
from lvlm_clorae.training.operators import load_operators, run_interruptibly
from lvlm_clorae.training.preemption import Interrupted
from tests.helpers.launch import REPOSITORY, command, environment, small_shards

SOON = 15.0
SLOW_COMPILER = """#!/bin/sh
case "$*" in *" -c "*) touch {started}; sleep 300;; esac
exec c++ "$@"
"""


@pytest.fixture
def request_stop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that requests a stop, for this test alone."""
    return lambda: monkeypatch.setattr("lvlm_clorae.training.preemption._stop_requested", True)


def test_a_stop_request_ends_a_compilation_and_its_processes(request_stop: Any) -> None:
    others, compiler = set(psutil.Process().children(recursive=True)), ["sh", "-c", "sleep 300 & wait"]
    started = time.monotonic()
    Timer(0.5, request_stop).start()
    with pytest.raises(Interrupted, match="while compiling"):
        run_interruptibly(lambda: subprocess.run(compiler, check=True), "compiling")
    assert time.monotonic() - started < SOON
    assert not set(psutil.Process().children(recursive=True)) - others


def test_a_compiler_that_ctrl_c_ended_is_an_interruption(request_stop: Any) -> None:
    def work() -> None:
        request_stop()
        raise RuntimeError("Error building extension")

    with pytest.raises(Interrupted):
        run_interruptibly(work, "compiling")


def test_a_stop_request_after_the_compilation_is_left_to_the_run(request_stop: Any) -> None:
    done = []
    run_interruptibly(lambda: (done.append(1), request_stop()), "compiling")
    assert done == [1]


def test_a_long_compilation_is_announced_and_its_error_is_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operators, "NOTICE", 0.0)

    def work() -> None:
        time.sleep(0.7)
        raise RuntimeError("Error building extension")

    with pytest.raises(RuntimeError, match="Error building"):
        run_interruptibly(work, "compiling it")
    assert capsys.readouterr().out == "compiling it ...\n"


@pytest.mark.parametrize(
    ("settings", "adam"),
    [
        ({}, []),
        ({"optimizer": {"type": "AdamW"}}, ["fused_adam"]),
        ({"optimizer": {"type": "Adam"}, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["cpu_adam"]),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, []),
        ({"optimizer": {"type": "Lion"}}, []),
    ],
)
def test_operators_of_a_deepspeed_file(settings: Any, adam: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr("deepspeed.ops.op_builder.OpBuilder.load", lambda builder: loaded.append(builder.NAME))
    load_operators(settings)
    assert loaded == ["deepspeed_shm_comm", *adam]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_an_operator_is_compiled_ends_the_run(number: int, tmp_path: Path) -> None:
    shards, started = small_shards(tmp_path / "shards"), tmp_path / "started"
    (tmp_path / "slow-c++").write_text(SLOW_COMPILER.format(started=started))
    (tmp_path / "slow-c++").chmod(0o755)
    settings = {"CXX": str(tmp_path / "slow-c++"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    line = command(1, "--output_dir", tmp_path / "run", "--shards", shards)
    process = subprocess.Popen(
        line,
        cwd=REPOSITORY,
        env={**environment(), **settings},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    sent = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < SOON
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert f"--output_dir {tmp_path / 'run'} --resume_from_checkpoint auto" in errors
    assert not [each for each in psutil.process_iter() if str(tmp_path) in " ".join(_command_line(each))]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
