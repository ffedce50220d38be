"""Whole runs without padding have the losses of padded ones, on one rank and under ZeRO-3 on two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.fork_server import train
from tests.helpers.launch import records, small_shards
from tests.helpers.tiny_causal import save_language, save_tower


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("shards"), train=12, dev=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_language(directory, "qwen2")
    save_tower(directory / "tower")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("model", "adapter"), [("causal", "clorae"), ("text", "loramoe"), ("demo", "clorae")])
def test_losses_of_a_run(tmp_path: Path, base: Path, shards: Path, model: str, adapter: str, ranks: int) -> None:
    vision = "none" if model == "text" else f"local-dir:{base / 'tower'}"
    settings: list[object] = ["--model", "demo"] if model == "demo" else ["--model", base, "--vision", vision]
    settings += ["--shards", shards, "--adapter", adapter, "--lora_dropout", 0]
    settings += ["--max_steps", 6, "--logging_steps", 1, "--per_device_train_batch_size", 4 // ranks, "--beta", 0.1]
    settings += ["--max_target_length", 8, "--dataloader_num_workers", ranks - 1, "--learning_rate", 1e-3]
    found = {}
    for padding_free in (False, True):
        directory = tmp_path / str(padding_free)
        output = train(directory, ranks, *settings, "--padding_free", padding_free, stage=1 + ranks)
        assert ("without padding" in output) == padding_free
        found[padding_free] = records(directory, "train")
    assert [one["step"] for one in found[True]] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "ce"):
        expected = pytest.approx([one[name] for one in found[False]], rel=1e-4)
        assert [one[name] for one in found[True]] == expected, name
