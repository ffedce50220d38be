"""A run that is killed or asked to stop at any moment ends with the same weights, bit for bit.

``max_steps`` ends it inside the second epoch.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from lvlm_clorae.training.run_directory import STATUS, read_status
from tests.helpers.fork_server import ForkServer, count_records, wait_for_records, wait_for_status
from tests.helpers.launch import REPOSITORY, records, small_shards

EPOCHS, STEPS, KILLS = 2, 33, {1: 20, 2: 8}
SETTINGS = [
    "--logging_steps",
    1,
    "--num_train_epochs",
    EPOCHS,
    "--max_steps",
    STEPS,
    "--save_steps",
    3,
    "--max_target_length",
    16,
]
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("interruptions") / "shards", train=16)


def arguments(directory: Path, shards: Path, ranks: int) -> list[object]:
    files = ["--deepspeed", REPOSITORY / "ds_configs/zero2.json", "--output_dir", directory, "--shards", shards]
    return [*files, "--per_device_train_batch_size", 4 // ranks, *SETTINGS, "--resume_from_checkpoint", "auto"]


@pytest.fixture(scope="module", params=[1, 2])
def whole(
    request: pytest.FixtureRequest, server: ForkServer, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """A number of ranks and an uninterrupted run on them."""
    ranks, directory = request.param, tmp_path_factory.mktemp("whole") / "run"
    log = directory.with_name("log")
    pids = server.start(ranks, log, *arguments(directory, shards, ranks))
    assert [server.wait(pid) for pid in pids] == [0] * ranks, log.read_text()
    return ranks, directory


def assert_equal(first: Path, second: Path) -> None:
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    for kind in ("train", "dev"):
        assert records(first, kind) == records(second, kind)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_repeated_random_interruptions_do_not_change_the_result(
    number: signal.Signals, whole: tuple[int, Path], server: ForkServer, shards: Path, tmp_path: Path
) -> None:
    """Interrupt a random rank at random steps, checkpoints and evaluations; the other rank must end by itself.

    Interruptions start after the rendezvous: before it, only the launcher notices that a rank died.
    """
    ranks, uninterrupted = whole
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    directory, log = tmp_path / "run", tmp_path / "log"
    kills = KILLS[ranks] if number == signal.SIGKILL else 3
    last = count_records(uninterrupted)
    for count in sorted(generator.choices(range(last + 1), k=kills)):
        if read_status(directory / STATUS).get("state") == "done":
            break  # such a run ends at once and writes no status
        started = time.time()
        pids = server.start(ranks, log, *arguments(directory, shards, ranks))
        victim = generator.choice(pids)
        wait_for_status(directory, started, log)
        wait_for_records(directory, count, log)
        time.sleep(generator.random() * 0.3)
        os.kill(victim, number)
        killed = time.monotonic()
        codes = [server.wait(pid) for pid in pids]
        assert time.monotonic() - killed < 60
        expected = {-signal.SIGKILL, 1} if number == signal.SIGKILL else {75}
        if count == last:
            expected.add(0)  # little is left to do then
        assert set(codes) <= expected, (codes, count, log.read_text())
    pids = server.start(ranks, log, *arguments(directory, shards, ranks))
    assert [server.wait(pid) for pid in pids] == [0] * ranks, log.read_text()
    assert_equal(directory, uninterrupted)
