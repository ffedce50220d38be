"""A run that is killed and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch import REPOSITORY, command, environment, records, small_shards, train

SETTINGS = ["--micro-batch", 4, "--log-every", 1, "--epochs", 2, "--checkpoint-every", 7, "--max-answer-length", 16]


def kill_at(directory: Path, shards: Path, step: int, resume: bool) -> None:
    """Start or resume the run and kill it by SIGKILL as soon as its metrics show ``step``."""
    arguments = [
        "--deepspeed",
        REPOSITORY / "ds_configs/zero2.json",
        "--output",
        directory,
        "--shards",
        shards,
        *SETTINGS,
    ]
    line = command(1, *arguments, *(["--resume", "auto"] if resume else []))
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            if (directory / "metrics.jsonl").exists():
                lines = (directory / "metrics.jsonl").read_text().splitlines()
                if sum('"kind": "train"' in text for text in lines) >= step:
                    return
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    shards = small_shards(tmp_path / "shards")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, 1, "--shards", shards, *SETTINGS)
    steps = len(records(whole, "train"))
    assert steps == 2 * 30
    seed = random.randrange(1 << 30)
    first = random.Random(seed).randrange(8, steps // 2)
    second = random.Random(seed + 1).randrange(steps // 2 + 8, steps - 1)
    print(f"seed {seed}: killed at steps {first} and {second}, and in the last evaluation")
    kill_at(broken, shards, first, resume=False)
    kill_at(broken, shards, second, resume=True)
    kill_at(broken, shards, steps, resume=True)
    printed = train(broken, 1, "--shards", shards, *SETTINGS, "--resume", "auto")
    assert "resumed from" in printed
    name = "adapter/adapter_model.safetensors"
    assert (broken / name).read_bytes() == (whole / name).read_bytes()
    for kind in ("train", "dev"):
        assert records(broken, kind) == records(whole, kind)
