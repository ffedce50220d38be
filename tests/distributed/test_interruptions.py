"""A run that is killed, or told to stop, at any moment ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.fork_server import ForkServer, count_records, wait_for_records, wait_for_status
from tests.launch import REPOSITORY, records, small_shards

EPOCHS, KILLS = 2, {1: 20, 2: 8}
SETTINGS = ["--log-every", 1, "--epochs", EPOCHS, "--checkpoint-every", 3, "--max-answer-length", 16, "--mim-tokens", 5]
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("interruptions") / "shards", train=16)


def arguments(directory: Path, shards: Path, ranks: int) -> list[object]:
    files = ["--deepspeed", REPOSITORY / "ds_configs/zero2.json", "--output", directory, "--shards", shards]
    return [*files, "--micro-batch", 4 // ranks, *SETTINGS, "--resume", "auto"]


@pytest.fixture(scope="module", params=[1, 2])
def whole(
    request: pytest.FixtureRequest, server: ForkServer, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """A number of ranks and the run that nothing interrupts."""
    ranks, directory = request.param, tmp_path_factory.mktemp("whole") / "run"
    log = directory.with_name("log")
    pids = server.start(ranks, log, *arguments(directory, shards, ranks))
    assert [server.wait(pid) for pid in pids] == [0] * ranks, log.read_text()
    return ranks, directory


def same(first: Path, second: Path) -> None:
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    for kind in ("train", "dev"):
        assert records(first, kind) == records(second, kind)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_random_interruptions_in_a_row_change_nothing(
    number: signal.Signals, whole: tuple[int, Path], server: ForkServer, shards: Path, tmp_path: Path
) -> None:
    """At random steps, during checkpoints and evaluations, and on a random rank; the other has to end by itself.

    From when the ranks have met: the end of a rank that the others do not know yet is the launcher's to see.
    """
    ranks, uninterrupted = whole
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    directory, log = tmp_path / "run", tmp_path / "log"
    kills = KILLS[ranks] if number == signal.SIGKILL else 3
    last = count_records(uninterrupted)
    for place in sorted(draw.choices(range(last + 1), k=kills)):
        started = time.time()
        pids = server.start(ranks, log, *arguments(directory, shards, ranks))
        victim = draw.choice(pids)
        wait_for_status(directory, started, log)
        wait_for_records(directory, place, log)
        time.sleep(draw.random() * 0.3)
        os.kill(victim, number)
        killed = time.monotonic()
        codes = [server.wait(pid) for pid in pids]
        assert time.monotonic() - killed < 60
        expected = {-signal.SIGKILL, 1} if number == signal.SIGKILL else {75}
        if place == last:
            expected.add(0)  # what is left then, on rank 0 alone, is short
        assert set(codes) <= expected, (codes, place, log.read_text())
    pids = server.start(ranks, log, *arguments(directory, shards, ranks))
    assert [server.wait(pid) for pid in pids] == [0] * ranks, log.read_text()
    same(directory, uninterrupted)
