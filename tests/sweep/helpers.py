"""Sweep files, and run directories as training leaves them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from lvlm_clorae.sweep.collect import Collected, collect
from lvlm_clorae.sweep.points import Point, Sweep, read_sweep
from lvlm_clorae.sweep.standing import standings


def write_sweep(folder: Path, content: object, name: str = "sweep.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def sweep_of(folder: Path, **content: Any) -> Sweep:
    """A sweep whose runs lie below ``folder``."""
    return read_sweep(write_sweep(folder, {"output": str(folder / "runs"), **content}))


def begin(point: Point, **status: Any) -> Path:
    """The directory of a run that has begun."""
    point.directory.mkdir(parents=True)
    (point.directory / "config.yaml").write_text(point.config.to_yaml(), encoding="utf-8")
    if status:
        (point.directory / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return point.directory


def finish(point: Point, **f1: float) -> Path:
    """The directory of a run that has ended, with these F1; ``unit_entity`` is the unit ``unit/entity``."""
    directory = begin(point, state="done", step=9, epoch=3)
    units = {name.replace("_", "/"): {"precision": 0.0, "recall": 0.0, "f1": value} for name, value in f1.items()}
    scores = {"all": sum(f1.values()), "maximum": 100.0 * len(f1), "units": units}
    (directory / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    if point.config.adapter != "none":
        (directory / "adapter").mkdir()
        (directory / "adapter" / "schema.json").write_text("{}", encoding="utf-8")
    return directory


def age(directory: Path, minutes: float) -> None:
    """Let the files of a directory have been written so long ago."""
    then = time.time() - 60 * minutes
    for path in directory.iterdir():
        os.utime(path, (then, then))


def collected(sweep: Sweep) -> Collected:
    return collect(sweep, standings(sweep.points))
