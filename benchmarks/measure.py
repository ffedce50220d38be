"""Fair timing for the benchmarks: interleaved repeats, medians, ratios within a repeat; and what autograd keeps."""

from __future__ import annotations

import argparse
import datetime
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def interleaved(
    steps: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each step in each round, every round in another order, after one round of warm-up.

    There are ``repeats`` rounds or more: as many as fill ``at_least`` seconds, since short steps are the noisier ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + at_least
    for number in itertools.count():
        if number > repeats and time.perf_counter() > end:
            break
        for name in rotated(list(steps), number):
            _synchronise(device)
            started = time.perf_counter()
            steps[name]()
            _synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def rotated(names: list[str], number: int) -> list[str]:
    """The order of round ``number``, a Williams design: of an even number of names, n, each follows every other once in
    n rounds. In a plain rotation each has one predecessor, and the state of caches that it leaves, almost always.
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2, ...
    return [names[(step + number) % count] for step in zigzag]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of one step's time by another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


@contextmanager
def kept_bytes(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Within, what autograd keeps for backward: bytes of its storages, each once, the module's own weights not.

    What is packed is detached: a node that kept its own output through a hook would hold itself, for ever.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def results_file(parser: argparse.ArgumentParser, given: Path | None, name: str) -> Path:
    """Where the results go: as given, or ``name`` in results/. Ends the command where that file is there already."""
    path = given or Path(__file__).parent / "results" / name
    if path.exists():
        parser.error(f"{path} exists and is not overwritten: name another with --output")
    return path


def description(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit, for the results file."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{models[0]}, {len(models)} cores" if models else cpu
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The short hash, with ``-dirty`` where tracked files differ from it; None outside git or without it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
