"""Gradient measurements on the DeepSpeed engine: two ranks equal one, and training is not affected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.launch import records, small_shards

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ADAPTER = "adapter/adapter_model.safetensors"
SETTINGS = [
    "--num_train_epochs",
    1,
    "--max-steps",
    8,
    "--logging_steps",
    1,
    "--save_steps",
    3,
    "--max_target_length",
    16,
]
MEASURED = 10  # the first step whose auxiliary share is measured with --logging_steps 1


class Runs:
    """Runs on the same base and shards."""

    def __init__(self, server: ForkServer, base: Path, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.common = ["--model", base, "--shards", small_shards(folder / "shards", train=24, dev=0, test=0), *SETTINGS]

    def run(self, name: str, ranks: int, *more: object, **how: Any) -> Path:
        self.server.run(
            ranks, self.folder / name, "--per_device_train_batch_size", 4 // ranks, *self.common, *more, **how
        )
        return self.folder / name


@pytest.fixture(scope="module")
def runs(server: ForkServer, random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(server, random_base, tmp_path_factory.mktemp("gradients"))


@pytest.fixture(scope="module")
def with_conflicts(runs: Runs) -> Path:
    return runs.run("with", 2, "--log-conflicts", 2)


def assert_equal(first: Path, second: Path) -> None:
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    assert records(first, "train") == records(second, "train")


def test_measuring_conflicts_does_not_affect_training(runs: Runs, with_conflicts: Path) -> None:
    assert_equal(with_conflicts, runs.run("without", 2))
    assert [record["step"] for record in records(with_conflicts, "conflicts")] == [0, 2, 4, 6]
    assert (with_conflicts / "conflicts.png").is_file()


@pytest.mark.parametrize("settings", [["--adapter", "lora"], ["--gradient_accumulation_steps", 2, "--bf16", "true"]])
def test_measuring_conflicts_does_not_affect_training_under_zero_1(settings: list[object], runs: Runs) -> None:
    name, common = settings[-1], ["--max-steps", 4, *settings]
    measured = runs.run(f"with-{name}", 2, "--log-conflicts", 2, *common, stage=1)
    assert_equal(measured, runs.run(f"without-{name}", 2, *common, stage=1))
    assert len(records(measured, "conflicts")) == 2


def test_two_ranks_measure_the_conflicts_of_one(runs: Runs, with_conflicts: Path) -> None:
    alone = runs.run("alone", 1, "--log-conflicts", 2, "--max-steps", 1)
    (one,), (two, *_) = records(alone, "conflicts"), records(with_conflicts, "conflicts")
    assert one["dataset_tasks"] == two["dataset_tasks"]
    assert np.abs(np.array(one["matrix"]) - np.array(two["matrix"])).max() < 1e-4


def test_an_interrupted_measurement_is_repeated_on_resume(runs: Runs, with_conflicts: Path) -> None:
    stopped = runs.run("stopped", 2, "--log-conflicts", 2, code=75, fault="stop_request_in_measurement")
    assert [record["step"] for record in records(stopped, "conflicts")] == [0, 2]
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    runs.run("stopped", 2, "--log-conflicts", 2, "--resume_from_checkpoint", "auto")
    assert_equal(stopped, with_conflicts)
    assert records(stopped, "conflicts") == records(with_conflicts, "conflicts")


def share(directory: Path) -> float:
    """Return the one auxiliary share that the run measured."""
    measured = {record["step"]: record.get("aux_gradient_share") for record in records(directory, "train")}
    value = measured.pop(MEASURED)
    assert set(measured.values()) == {None}
    assert value is not None
    return float(value)


SHARE = ["--max-steps", MEASURED + 1, "--lora_dropout", 0, "--learning-rate", 1e-3, "--beta", 0.1]


@pytest.fixture(scope="module")
def share_of_one_rank(runs: Runs) -> float:
    return share(runs.run("share", 1, *SHARE))


@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"]], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_measure_the_auxiliary_share_of_one(
    stage: int, more: list[str], runs: Runs, share_of_one_rank: float
) -> None:
    measured = share(runs.run(f"share-{stage}{''.join(more)}", 2, *SHARE, *more, stage=stage))
    assert measured == pytest.approx(share_of_one_rank, rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_auxiliary_share_in_bf16_is_near_that_in_fp32(stage: int, runs: Runs, share_of_one_rank: float) -> None:
    measured = share(runs.run(f"share-{stage}-bf16", 2, *SHARE, "--bf16", "true", stage=stage))
    assert measured == pytest.approx(share_of_one_rank, rel=0.1)


@pytest.mark.parametrize(
    "more", [[], ["--gradient_accumulation_steps", 2, "--gradient-checkpointing"]], ids=["plain", "accumulation"]
)
@pytest.mark.parametrize("stage", [2, 3])
def test_measuring_the_auxiliary_share_does_not_affect_training(stage: int, more: list[object], runs: Runs) -> None:
    """With dropout. A run that logs every second step does not measure before step 20."""
    name = f"{stage}-{len(more)}"
    settings = ["--max-steps", MEASURED + 3, "--num_train_epochs", 2, "--adapter", "clorae", *more]
    measured = runs.run(f"measured-{name}", 2, *settings, stage=stage)
    silent = runs.run(f"silent-{name}", 2, *settings, "--logging_steps", 2, stage=stage)
    assert share(measured) > 0
    assert (measured / ADAPTER).read_bytes() == (silent / ADAPTER).read_bytes()
