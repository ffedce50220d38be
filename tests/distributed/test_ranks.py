"""Two ranks do what one does: the same losses step by step, the same achievement weights, the same scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launch import records, small_shards, train

STEPS = 20
SETTINGS = ["--dropout", 0, "--learning-rate", 1e-4, "--log-every", 1, "--epochs", 2, "--max-answer-length", 16]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("ranks") / "shards")


@pytest.fixture(scope="module")
def one_rank(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one") / "run"
    train(directory, 1, "--shards", shards, "--micro-batch", 4, *SETTINGS)
    return directory


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_with_half_the_micro_batch_equal_one(
    stage: int, shards: Path, one_rank: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    train(directory, 2, "--shards", shards, "--micro-batch", 2, *SETTINGS, stage=stage)
    alone, together = records(one_rank, "train"), records(directory, "train")
    assert [record["unit"] for record in alone] == [record["unit"] for record in together]
    for name in ("loss", "ce", "mim"):
        # Relative where the loss is above 1: one forward of these losses of about 7 is good to 5e-6 in fp32.
        pairs = [(a[name], b[name]) for a, b in zip(alone[:STEPS], together[:STEPS], strict=True)]
        assert max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs) < 1e-5, (name, pairs)
    # The scores come from summed counts, the weights from the scores.
    for name in ("f1", "weights"):
        assert [record[name] for record in records(one_rank, "dev")] == [r[name] for r in records(directory, "dev")]
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one_rank, directory))
    assert first.keys() == second.keys()
    assert all(tensor.numel() for tensor in second.values())
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() < 2e-3, name
