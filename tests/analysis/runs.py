"""Run directories as training leaves them, with the scores that a test gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_clorae.training.config import make_config


def make_run(directory: Path, f1: Mapping[str, float], **settings: Any) -> Path:
    """A run with these F1 by unit, and its settings over the recipe of its base."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(make_config(settings).to_yaml(), encoding="utf-8")
    units = {unit: {"precision": 0.0, "recall": 0.0, "f1": value} for unit, value in f1.items()}
    scores = {"all": sum(f1.values()), "maximum": 100.0 * len(f1), "units": units}
    (directory / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    return directory
