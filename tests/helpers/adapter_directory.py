"""Schema files of adapter directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvlm_clorae.digests import write_digests
from lvlm_clorae.inference.adapter_directory import SCHEMA, SCHEMA_VERSION
from lvlm_clorae.models import load_model
from lvlm_clorae.models.fingerprint import base_fingerprint
from lvlm_clorae.tasks import TASKS
from tools.demo_data.generator import DATASETS


def write_schema(directory: Path, base: str, **changes: Any) -> None:
    """Write schema and digests with the dataset tasks of the demo datasets, like lvlm_clorae/training/export.py."""
    dataset_tasks = {
        f"{name}/{subtask}": {"dataset": name, "task": spec.task, "subtask": subtask, "labels": spec.labels[subtask]}
        for name, spec in DATASETS.items()
        for subtask in TASKS[spec.task]
    }
    schema = {
        "version": SCHEMA_VERSION,
        "base": base,
        "base_fingerprint": base_fingerprint(load_model(base)[0]) if Path(base).is_dir() else {},
        "adapter": "clorae",
        "tasks": list(TASKS),
        "dataset_tasks": dataset_tasks,
        "max_source_length": 256,
        "max_target_length": 8,
    }
    (directory / SCHEMA).write_text(json.dumps({**schema, **changes}), encoding="utf-8")
    write_digests(directory)
