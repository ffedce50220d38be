"""Start ``train.py`` in processes of its own, alone or with the deepspeed launcher."""

from __future__ import annotations

import json
import os
import socket
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from lvlm_clorae.data.index import DatasetSpec
from lvlm_clorae.data.writer import ShardWriter
from tools.demo_data import generator

REPOSITORY = Path(__file__).parents[2]


def small_shards(directory: Path, train: int = 24, dev: int = 4, test: int = 3) -> Path:
    """Write a few samples of every demo dataset, ten a shard."""
    for name, spec in generator.DATASETS.items():
        dataset = DatasetSpec(name, spec.task, tuple(spec.labels), spec.labels, spec.reference_f1)
        with ShardWriter(directory, dataset, max_samples=10) as writer:
            for split, count in (("train", train), ("dev", dev), ("test", test)):
                for key, sample, image in islice(generator.samples(name, split, seed=7), count):
                    writer.add(split, key, sample, image)
    return directory


def command(ranks: int, *arguments: object) -> list[str]:
    """Return the command line of a run on ``ranks`` CPU ranks."""
    script = [str(REPOSITORY / "train.py"), *map(str, arguments)]
    if ranks == 1:
        return [sys.executable, *script]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), *script]


def environment() -> dict[str, str]:
    """Return the environment with one thread a rank and without GPUs."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def two_ranks_line(script: str, *arguments: object) -> list[str]:
    """Return the command line of a script of tests/distributed on two ranks of the deepspeed launcher."""
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", 2, "--master_port", free_port()]
    return [*map(str, launcher), str(REPOSITORY / "tests/distributed" / script), *map(str, arguments)]


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind in the run's metrics."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
