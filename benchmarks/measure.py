"""Fair timing for the benchmarks: interleaved repeats, medians, ratios within a repeat; and what autograd keeps."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def interleaved(steps: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each of ``repeats`` rounds, every round in another order, after one round of warm-up."""
    names, seconds = list(steps), {name: [] for name in steps}
    for number in range(repeats + 1):
        for offset in range(len(names)):
            name = names[(number + offset) % len(names)]
            _synchronise(device)
            started = time.perf_counter()
            steps[name]()
            _synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of one step's time by another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


@contextmanager
def kept_bytes(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Within, what autograd keeps for backward: bytes of its storages, each once, the module's own weights not."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def description(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit, for the results file."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{models[0]}, {len(models)} cores" if models else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "commit": commit.stdout.strip() or None,
    }
