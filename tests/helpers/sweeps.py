"""Sweep files, the run directories of their runs, and strategies for settings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from lvlm_clorae.sweep.expand import Sweep, SweepRun, read_sweep
from tests.helpers.runs import write_scores

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=50)
LISTS = st.lists(TEXT, max_size=4)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["demo", "flan-t5-base", "owner/name"]) | TEXT,
    "vision": st.none() | st.just("none") | TEXT,
    "template": st.none() | TEXT,
    "vision_layer": st.none() | st.integers(-9, 9),
    "load_in_8bit": st.booleans(),
    "adapter": st.sampled_from(["clorae", "lora", "moslora", "loramoe", "mtllora", "hydralora", "full", "none"]),
    "lora_rank": st.integers(1, 10**9),
    "lora_alpha": st.none() | st.floats(1e-300, 1e300),
    "lora_dropout": st.floats(0, 0.99),
    "target_modules": LISTS,
    "hold_out": LISTS,
    "use_gate": st.booleans(),
    "shards": TEXT,
    "interleave": st.sampled_from(["proportional", "balanced", "temperature"]),
    "gamma": st.floats(0.1, 9),
    "margin": st.floats(1.01, 9),
    "beta": st.floats(0, 9),
    "ema": st.none() | st.floats(0, 0.9),
    "max_steps": st.none() | st.integers(1, 99),
    "learning_rate": st.floats(1e-9, 1),
    "deepspeed": st.sampled_from(["zero2", "ds_configs/zero3.json"]),
}
"""Values of the configuration's types by setting."""


def varied_settings() -> st.SearchStrategy[dict[str, Any]]:
    """Some settings, with or without a seed."""
    return st.fixed_dictionaries({}, optional={**SETTINGS, "seed": st.integers(0, 1 << 62)})


def write_sweep(folder: Path, content: object, name: str = "sweep.yaml") -> Path:
    """Write a sweep file from text or data."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def bomb(form: str) -> str:
    """Return YAML whose aliases, in a collection like ``[{}]`` on each of 30 lines, expand to 9^29 values."""
    lines = [f"a{n}: &a{n} {form.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 30)]
    return "\n".join(["a0: &a0 {b: 1}", *lines])


def sweep_of(folder: Path, **content: Any) -> Sweep:
    """A sweep with its runs in ``<folder>/runs``."""
    return read_sweep(write_sweep(folder, {"output_dir": str(folder / "runs"), **content}))


def begin(sweep_run: SweepRun, **status: Any) -> Path:
    """Make the directory of a run that has begun."""
    sweep_run.directory.mkdir(parents=True)
    (sweep_run.directory / "config.yaml").write_text(sweep_run.config.to_yaml(), encoding="utf-8")
    if status:
        (sweep_run.directory / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return sweep_run.directory


def finish(sweep_run: SweepRun, **f1: float) -> Path:
    """Make the directory of a finished run with this F1; the argument ``a_entity`` is the dataset task a/entity."""
    directory = begin(sweep_run, state="done", step=9, epoch=3)
    write_scores(directory, {name.replace("_", "/"): value for name, value in f1.items()})
    if sweep_run.config.adapter != "none":
        (directory / "adapter").mkdir()
        (directory / "adapter" / "schema.json").write_text("{}", encoding="utf-8")
    return directory


def age(directory: Path, minutes: float) -> None:
    """Set the modification time of a directory's files this long ago."""
    then = time.time() - 60 * minutes
    for path in directory.iterdir():
        os.utime(path, (then, then))


def mixed_sweep(folder: Path) -> Sweep:
    """Two ranks and plain LoRA with three seeds; one run failed, one has damaged scores, one waits."""
    sweep = sweep_of(
        folder,
        settings={"model": "owner/name"},
        grid={"lora_rank": [8, 16]},
        sweep_runs=[{"adapter": "lora"}],
        seeds=[0, 1, 2],
    )
    for number, (entity, relation) in enumerate([(50, 21), (60, 25), (55, 23), (70, 30), (72, 30)]):
        finish(sweep.sweep_runs[number], a_entity=float(entity), b_relation=float(relation))
    begin(sweep.sweep_runs[5], state="failed", message="out of memory")
    finish(sweep.sweep_runs[6], a_entity=40.0, b_relation=10.0)
    (finish(sweep.sweep_runs[7], a_entity=40.0) / "scores.json").write_text('{"all": 3')
    return sweep
