"""Training on remote shards with one invalid image."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import read_samples
from tests.helpers.fork_server import train
from tests.helpers.launch import records, small_shards
from tests.helpers.server import serve

SETTINGS = [
    "--lora_rank",
    4,
    "--num_train_epochs",
    1,
    "--per_device_train_batch_size",
    2,
    "--max_target_length",
    8,
    "--dataloader_num_workers",
    1,
    "--logging_steps",
    1,
]


def break_image(directory: Path) -> str:
    """Damage a training image of the demo's posts and return the key of its sample."""
    samples = read_samples(directory, load_index(directory), "demo_posts", "train")
    key, image = next((key, image) for key, _, image in samples if image)
    for path in directory.glob("demo_posts-train-*.tar"):
        data = path.read_bytes()
        path.write_bytes(data.replace(image[:200], image[:20] + bytes(180)))
    return key


@pytest.mark.slow
def test_a_run_over_http_skips_an_invalid_image(tmp_path: Path) -> None:
    directory = small_shards(tmp_path / "shards", train=8, dev=2, test=2)
    key = break_image(directory)
    with serve(directory) as server:
        server.fault = lambda number: 503 if number % 10 == 0 else None
        run = tmp_path / "run"
        printed = train(run, 1, "--shards", server.url, "--on_invalid_sample", "skip", *SETTINGS)
    steps = records(run, "train")
    assert len(steps) == 5 * 4
    assert steps[-1]["invalid_samples"] == 1
    assert sum(step.get("invalid_samples", 0) == 0 for step in steps) > 0
    assert key in printed
