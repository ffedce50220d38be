"""Every file of ds_configs/ trains on two ranks with the losses of ZeRO-2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.launch import REPOSITORY, records, small_shards

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))
STEPS = 6
# LLM.int8 quantises each row of the base to 127 levels (docs/models.md).
TOLERANCE = {"zero2_int8": 0.05}


def train(server: ForkServer, base: Path, file: Path, directory: Path, *more: object) -> list[float]:
    """Return the losses of a few steps on two ranks."""
    shards, log = directory.with_name("shards"), directory.with_name("log")
    if not shards.exists():
        small_shards(shards, train=8, dev=0, test=0)
    run = [
        "--deepspeed",
        file,
        "--output_dir",
        directory,
        "--shards",
        shards,
        "--per_device_train_batch_size",
        2,
        "--logging_steps",
        1,
    ]
    settings = [
        "--model",
        base,
        "--lora_dropout",
        0,
        "--learning-rate",
        1e-3,
        "--max-steps",
        STEPS,
        "--num_train_epochs",
        1,
    ]
    pids = server.start(2, log, *run, *settings, *more)
    assert [server.wait(pid) for pid in pids] == [0, 0], log.read_text()
    return [record["loss"] for record in records(directory, "train")]


@pytest.fixture(scope="module")
def losses(server: ForkServer, random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of each file by step."""
    folder = tmp_path_factory.mktemp("files")
    return {file.stem: train(server, random_base, file, folder / file.stem) for file in FILES}


@pytest.mark.parametrize("file", [file.stem for file in FILES])
def test_every_file_gives_the_losses_of_zero2(file: str, losses: dict[str, list[float]]) -> None:
    assert len(losses[file]) == STEPS
    assert losses["zero2"][-1] < losses["zero2"][0]
    assert losses[file] == pytest.approx(losses["zero2"], abs=TOLERANCE.get(file, 1e-5))


def test_zero3_in_bf16_gives_the_losses_of_zero2(server: ForkServer, random_base: Path, tmp_path: Path) -> None:
    """The default on a GPU; adapters are added to a base that was loaded partitioned."""
    found = {
        name: train(server, random_base, REPOSITORY / f"ds_configs/{name}.json", tmp_path / name, "--bf16", "true")
        for name in ("zero2", "zero3")
    }
    assert len(found["zero3"]) == STEPS
    assert found["zero3"] == pytest.approx(found["zero2"], abs=0.05)
