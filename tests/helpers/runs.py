"""Run directories with given scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_clorae.training.config_loading import make_config


def make_run(directory: Path, f1: Mapping[str, float], **settings: Any) -> Path:
    """Make a finished run with this F1 by dataset task, and these settings over the recipe of its base."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(make_config(settings).to_yaml(), encoding="utf-8")
    write_scores(directory, f1)
    return directory


def write_scores(directory: Path, f1: Mapping[str, float]) -> None:
    """Write ``scores.json`` with this F1 by dataset task."""
    dataset_tasks = {name: {"precision": 0.0, "recall": 0.0, "f1": value} for name, value in f1.items()}
    scores = {"all": sum(f1.values()), "maximum": 100.0 * len(f1), "dataset_tasks": dataset_tasks}
    (directory / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
