"""Every file of ds_configs/ trains on two ranks, and to the losses of ZeRO-2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fork_server import ForkServer
from tests.launch import REPOSITORY, records, small_shards

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))
STEPS = 6
# LLM.int8 rounds the base to 127 steps a row (docs/models.md).
TOLERANCE = {"zero2_int8": 0.05}


@pytest.fixture(scope="module")
def losses(fresh_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Of each file, step by step."""
    folder = tmp_path_factory.mktemp("files")
    shards = small_shards(folder / "shards", train=8, dev=0, test=0)
    found = {}
    settings = ["--model", fresh_base, "--dropout", 0, "--learning-rate", 1e-3, "--max-steps", STEPS, "--epochs", 1]
    for file in FILES:
        with ForkServer() as server:  # each file with a DeepSpeed that has seen no other
            run = ["--deepspeed", file, "--output", folder / file.stem, "--shards", shards, "--micro-batch", 2]
            pids = server.start(2, folder / "log", *run, *settings, "--log-every", 1)
            assert [server.wait(pid) for pid in pids] == [0, 0], (folder / "log").read_text()
        found[file.stem] = [record["loss"] for record in records(folder / file.stem, "train")]
    return found


@pytest.mark.parametrize("file", [file.stem for file in FILES])
def test_the_losses_are_those_of_zero2(file: str, losses: dict[str, list[float]]) -> None:
    assert len(losses[file]) == STEPS
    assert losses["zero2"][-1] < losses["zero2"][0]
    assert losses[file] == pytest.approx(losses["zero2"], abs=TOLERANCE.get(file, 1e-5))
