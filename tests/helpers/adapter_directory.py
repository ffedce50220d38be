"""Adapter directories and their schema files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch

from lvlm_clorae import CLoRAEConfig
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


def save_adapter(directory: Path, base: Path, adapter: str = "clorae") -> Path:
    """Save an adapter of rank 4 on a tiny base, with random weights in all trained parts."""
    model, processor = load_model(str(base))
    common: dict[str, Any] = {
        "r": 4,
        "target_modules": ["q", "v"],
        "exclude_modules": r".*(vision_tower|projector)\..*",
        "modules_to_save": ["projector"],
    }
    config = peft.LoraConfig(**common) if adapter == "lora" else CLoRAEConfig(tasks=list(TASKS), **common)
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    tuned.save_pretrained(str(directory), save_embedding_layers=False)
    processor.save_pretrained(directory)
    write_schema(directory, str(base), adapter=adapter)
    return directory
