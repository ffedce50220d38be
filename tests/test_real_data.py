"""The main job on published data: built, one epoch trained, evaluated, and asked. Skips where the files are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lvlm_clorae.cli import main as cli
from lvlm_clorae.training.config import read_config
from tests.launch import records, train
from tests.published import DATA, FOLDERS

SAMPLES = 300
UNITS = {"twitter15/entity", "mre_v1/relation", "m2e2/trigger", "m2e2/argument"}


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no published data at {DATA}")
def test_an_epoch_on_real_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    for name, folder in FOLDERS.items():
        arguments = ["--dataset", name, "--input", str(DATA / folder), "--images", str(DATA / "images")]
        assert cli(["shards", "build", *arguments, "--output", str(shards), "--limit", str(SAMPLES)]) == 0
    assert cli(["shards", "verify", str(shards)]) == 0
    printed = train(
        run, 1, "--shards", shards, "--epochs", 1, "--max-answer-length", 32, "--eval-batch", 50, timeout=900
    )
    assert "All" in printed

    (dev,) = records(run, "dev")
    assert set(dev["f1"]) == set(dev["weights"]) == UNITS
    losses = [record["ce"] for record in records(run, "train")]
    # The last step: each unit's samples once, a batch a step. The loss of an unknown answer format falls in the epoch.
    assert dev["step"] == len(UNITS) * -(-SAMPLES // read_config(run / "config.yaml").micro_batch)
    assert sum(losses[-3:]) < sum(losses[:3])

    for unit in UNITS:
        dataset, subtask = unit.split("/")
        text = (run / "predictions" / f"predictions-{dataset}-test.jsonl").read_text(encoding="utf-8")
        keys = [line["key"] for line in map(json.loads, text.splitlines()) if line["subtask"] == subtask]
        assert len(set(keys)) == len(keys) == SAMPLES
    capsys.readouterr()
    assert cli(["predict", "--run", str(run), "--text", "Greta Falkner arrives in Valmora", "--task", "mner"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert json.loads(line)["record"] == "entity"
