"""Shards of the published datasets for real.py: fixed subsets for the comparison, everything for the full run."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from lvlm_clorae.data.convert import build
from lvlm_clorae.data.index import INDEX_NAME, SPLITS, DatasetSpec, load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.validation import verify
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import gold_tuples

FOLDERS = {"twitter15": "twitter15", "mre_v1": "mnre_v1", "m2e2": "m2e2", "sroie": "sroie", "funsd": "funsd"}
"""Directory of each dataset in --data."""
DOCUMENTS = ("sroie", "funsd")
LIMITS = {"dev": 60, "test": 500}
"""Samples of a dataset in a split, at most."""
DOCUMENT_LIMITS = {"dev": 12, "test": 40}
"""The same for a dataset of documents, whose prompts and answers are ten times as long."""
SEED = 20261129
"""Draws the subsets; every run of the comparison has the same."""


def build_all(directory: Path, data: Path, boxes: bool) -> None:
    """Write the shards of all datasets that are missing. Raise UserError for missing files and bad shards.

    Args:
        boxes: whether the text of documents has the boxes of its lines
    """
    present = load_index(directory).datasets if (directory / INDEX_NAME).is_file() else {}
    for name, folder in FOLDERS.items():
        if name not in present:
            images = data / (folder if name in DOCUMENTS else "images")
            report = build(name, data / folder, images, directory, layout=boxes)
            print(f"built {name}: {', '.join(f'{report.samples[split]} {split}' for split in SPLITS)}", flush=True)
    if problems := verify(directory).problems:
        raise UserError(f"{directory}: {problems[0]} ({len(problems)} in all). Remove it to build again.")


def write_subset(source: Path, directory: Path, name: str, limits: Mapping[str, int], task: str | None) -> None:
    """Write at most ``limits`` samples a split of a dataset, drawn by :data:`SEED`, in the original order.

    Nothing is written if ``task`` is another than the dataset's.
    """
    index = load_index(source)
    entry = index.dataset(name)
    if task not in (None, entry.task):
        return
    spec = DatasetSpec(**{item.name: getattr(entry, item.name) for item in fields(DatasetSpec)})
    with ShardWriter(directory, spec) as writer:
        for split, limit in limits.items():
            samples = list(read_samples(source, index, name, split))
            is_empty = [not any(gold_tuples(sample, subtask) for subtask in entry.subtasks) for _, sample, _ in samples]
            for number in choose(is_empty, limit, f"{SEED}/{name}/{split}", split == "train"):
                writer.add(split, *samples[number])


def choose(is_empty: Sequence[bool], limit: int, seed: str, balanced: bool) -> list[int]:
    """Draw at most ``limit`` numbers of samples.

    Args:
        is_empty: for each sample, whether it has no gold
        balanced: at most half of the drawn ones are empty; most sentences of M2E2 have no event
    """
    order = list(range(len(is_empty)))
    random.Random(seed).shuffle(order)
    if balanced and len(order) > limit:
        empty = [number for number in order if is_empty[number]]
        share = min(limit // 2, round(limit * len(empty) / len(order)))
        order = [number for number in order if not is_empty[number]][: limit - share] + empty[:share]
    return sorted(order[:limit])
