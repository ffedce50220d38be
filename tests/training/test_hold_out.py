"""A run with a held-out dataset and early stopping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.fork_server import train
from tests.helpers.launch import records, small_shards

SETTINGS = "--lora_rank 4 --per_device_train_batch_size 8 --max_target_length 8 --learning-rate 1e-9".split()


@pytest.mark.slow
def test_a_held_out_dataset_is_only_tested_and_training_stops_early(tmp_path: Path) -> None:
    """Nothing is learnt at this learning rate: the first evaluation is the best, the second the last."""
    shards, run = small_shards(tmp_path / "shards", train=8, dev=2, test=2), tmp_path / "run"
    flags = [
        "--hold-out",
        "demo_news",
        "--reference-f1",
        "demo_posts/entity=50",
        "--early_stopping_patience",
        1,
        "--num_train_epochs",
        9,
    ]
    train(run, 1, "--shards", shards, *SETTINGS, *flags, "--logging_steps", 1)
    trained = {"demo_events/trigger", "demo_events/argument", "demo_pairs/relation", "demo_posts/entity"}

    assert {record["dataset_task"] for record in records(run, "train")} == trained
    evaluated = records(run, "dev")
    assert all(set(record["f1"]) == set(record["weights"]) == trained for record in evaluated)
    assert set(json.loads((run / "scores.json").read_text())["dataset_tasks"]) == {*trained, "demo_news/entity"}
    assert (run / "predictions" / "predictions-demo_news-test.jsonl").is_file()
    assert set(json.loads((run / "adapter" / "schema.json").read_text())["dataset_tasks"]) == trained

    assert [record["epoch"] for record in evaluated] == [1, 2]
    assert (run / "progress.png").stat().st_size > 5000
