"""The demo's base alone knows nothing of the tasks: what a run reaches, training has taught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.fork_server import train
from tests.helpers.launch import REPOSITORY


@pytest.mark.slow
def test_the_frozen_base_stays_under_a_tenth(tmp_path: Path) -> None:
    train(tmp_path / "run", 1, "--adapter", "none", "--shards", REPOSITORY / "shards" / "demo")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["maximum"] == 500.0
    assert scores["all"] < 50.0
    assert not (tmp_path / "run" / "adapter").exists()
