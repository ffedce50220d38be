"""Timing for the benchmarks: interleaved rounds, medians, ratios within a round; and the memory autograd keeps."""

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
    """Time each step in each round [s], in a different order every round, after one warm-up round.

    Args:
        steps: functions by name
        repeats: minimum number of rounds
        device: synchronised before and after each step
        at_least: minimum duration of all rounds [s]; short steps are noisier and need more rounds
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
    """The order of round ``number``, a Williams design.

    For an even number n of names each follows every other one once in n rounds. In a plain rotation each would almost
    always follow the same one, in the state of the caches that it leaves.
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2, ...
    return [names[(step + number) % count] for step in zigzag]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of the ratio of two steps' times."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


@contextmanager
def kept_bytes(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves for backward inside the context, without the module's weights.

    Each storage counts once. Saved tensors are detached, since a node that saved its own output through a hook would
    keep itself alive.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def results_file(parser: argparse.ArgumentParser, given: Path | None, name: str) -> Path:
    """Path of the results: as given, or ``name`` in results/. End the command if the file exists."""
    path = given or Path(__file__).parent / "results" / name
    if path.exists():
        parser.error(f"{path} exists and is not overwritten. Choose another --output.")
    return path


def description(device: torch.device) -> dict[str, Any]:
    """Describe machine, library versions and commit for a results file."""
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
    """Short hash, with ``-dirty`` if tracked files differ; None without git or outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
