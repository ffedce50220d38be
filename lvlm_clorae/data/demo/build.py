"""The demo's shards: drawn by the generator, written like any other dataset's."""

from __future__ import annotations

from pathlib import Path

from lvlm_clorae.data.demo.generator import DATASETS, samples
from lvlm_clorae.data.shards import DatasetSpec, Index, ShardWriter, load_index
from lvlm_clorae.tasks.schema import TASKS

SHARD_SAMPLES = 100
"""Few samples a shard, so that most datasets have several, as real ones do."""


def build_demo(output: Path, seed: int = 0) -> Index:
    """Add the demo datasets to the shards of `output` and return its index; the same seed gives the same bytes.

    Raises UserError where `output` already has one of them, or cannot be written.
    """
    for name, dataset in DATASETS.items():
        spec = DatasetSpec(name, dataset.task, TASKS[dataset.task].subtasks, dataset.labels, dataset.reference_f1)
        with ShardWriter(output, spec, max_samples=SHARD_SAMPLES) as writer:
            for split in dataset.sizes:
                for key, sample, picture in samples(name, split, seed):
                    writer.add(split, key, sample, picture)
    return load_index(output)
