"""Training on published data: build, one epoch, evaluation and prediction; skipped without the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lvlm_clorae.cli import main as cli
from lvlm_clorae.training.config_loading import read_config
from tests.helpers.fork_server import train
from tests.helpers.launch import records
from tests.helpers.published import DATA, FOLDERS

SAMPLES = 100
DATASET_TASKS = {"twitter15/entity", "mre_v1/relation", "m2e2/trigger", "m2e2/argument"}


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no published data at {DATA}")
def test_an_epoch_on_real_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    for name, folder in FOLDERS.items():
        arguments = ["--dataset", name, "--input", str(DATA / folder), "--images", str(DATA / "images")]
        assert cli(["shards", "build", *arguments, "--output_dir", str(shards), "--limit", str(SAMPLES)]) == 0
    assert cli(["shards", "verify", str(shards)]) == 0
    printed = train(
        run,
        1,
        "--shards",
        shards,
        "--num_train_epochs",
        1,
        "--logging_steps",
        1,
        "--max_source_length",
        1024,
        "--max_target_length",
        32,
        "--per_device_eval_batch_size",
        50,
    )
    assert "All" in printed

    (dev,) = records(run, "dev")
    assert set(dev["f1"]) == set(dev["weights"]) == DATASET_TASKS
    losses = [record["ce"] for record in records(run, "train")]
    # Each sample once, one batch a step. The loss decreases during the epoch while the answer format is learned.
    assert dev["step"] == len(DATASET_TASKS) * -(
        -SAMPLES // read_config(run / "config.yaml").per_device_train_batch_size
    )
    half = len(losses) // 2
    assert sum(losses[-half:]) < sum(losses[:half])

    for dataset_task in DATASET_TASKS:
        dataset, subtask = dataset_task.split("/")
        text = (run / "predictions" / f"predictions-{dataset}-test.jsonl").read_text(encoding="utf-8")
        keys = [line["key"] for line in map(json.loads, text.splitlines()) if line["subtask"] == subtask]
        assert len(set(keys)) == len(keys) == SAMPLES
    capsys.readouterr()
    assert cli(["predict", "--run", str(run), "--text", "Greta Falkner arrives in Valmora", "--task", "mner"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert json.loads(line)["record"] == "entity"
