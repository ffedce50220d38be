"""A run that holds a dataset out, and one that ends because nothing gets better."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import records, small_shards, train

SETTINGS = "--rank 4 --micro-batch 8 --max-answer-length 8 --learning-rate 1e-9".split()


@pytest.mark.slow
def test_held_out_until_the_test_and_ended_by_patience(tmp_path: Path) -> None:
    """At this rate nothing is learnt: the first evaluation is the best, and the next one the last."""
    shards, run = small_shards(tmp_path / "shards", train=8, dev=2, test=2), tmp_path / "run"
    flags = ["--hold-out", "demo_news", "--reference-f1", "demo_posts/entity=50", "--patience", 1, "--epochs", 9]
    printed = train(run, 1, "--shards", shards, *SETTINGS, *flags, "--log-every", 1)
    trained = {"demo_events/trigger", "demo_events/argument", "demo_pairs/relation", "demo_posts/entity"}

    assert "demo_posts/entity 8 (50)" in printed
    assert {record["unit"] for record in records(run, "train")} == trained
    evaluated = records(run, "dev")
    assert all(set(record["f1"]) == set(record["weights"]) == trained for record in evaluated)
    assert set(json.loads((run / "scores.json").read_text())["units"]) == {*trained, "demo_news/entity"}
    assert (run / "predictions" / "predictions-demo_news-test.jsonl").is_file()
    assert set(json.loads((run / "adapter" / "schema.json").read_text())["units"]) == trained

    assert [record["epoch"] for record in evaluated] == [1, 2]
    assert "1 evaluations ago: training ends here" in printed
    assert (run / "progress.png").stat().st_size > 5000
