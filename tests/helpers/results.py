"""Results files of the benchmarks."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers.launch import REPOSITORY

FORMER_KEYS = {'"units":': '"dataset_tasks":', '"unit":': '"dataset_task":', '"pictures":': '"image_files":'}
"""Keys in files written before 2026-11-28, which are kept as they are, and the current ones."""


def read_results(name: str) -> dict[str, Any]:
    """Read ``benchmarks/results/<name>.json`` with the current keys."""
    text = (REPOSITORY / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8")
    for former, current in FORMER_KEYS.items():
        text = text.replace(former, current)
    content: dict[str, Any] = json.loads(text)
    return content
