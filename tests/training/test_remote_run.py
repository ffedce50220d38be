"""The whole job on shards that are elsewhere, one picture of them broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_clorae.data.shards import load_index, read_samples
from tests.data.server import serve
from tests.launch import records, small_shards, train

SETTINGS = ["--rank", 4, "--epochs", 1, "--micro-batch", 2, "--max-answer-length", 8, "--workers", 1, "--log-every", 1]


def break_a_picture(directory: Path) -> str:
    """Damage a training picture of the demo's posts; returns the sample's key."""
    samples = read_samples(directory, load_index(directory), "demo_posts", "train")
    key, picture = next((key, picture) for key, _, picture in samples if picture)
    for path in directory.glob("demo_posts-train-*.tar"):
        data = path.read_bytes()
        path.write_bytes(data.replace(picture[:200], picture[:20] + bytes(180)))
    return key


@pytest.mark.slow
def test_a_run_over_http_that_skips_a_broken_picture(tmp_path: Path) -> None:
    directory = small_shards(tmp_path / "shards", train=8, dev=2, test=2)
    key = break_a_picture(directory)
    with serve(directory) as server:
        server.fault = lambda number: 503 if number % 10 == 0 else None
        run = tmp_path / "run"
        printed = train(run, 1, "--shards", server.url, "--on-bad-sample", "skip", *SETTINGS)
    steps = records(run, "train")
    assert len(steps) == 5 * 4
    assert steps[-1]["bad_samples"] == 1
    assert sum(step.get("bad_samples", 0) == 0 for step in steps) > 0
    assert f"{key}: its picture cannot be decoded" in printed
