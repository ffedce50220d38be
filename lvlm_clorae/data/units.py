"""The unit of schedule, weighting and evaluation: a dataset and sub-task, as ``twitter15/entity``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lvlm_clorae.data.index import Index


@dataclass(frozen=True)
class Unit:
    """A dataset and sub-task, with what is needed to ask and to score it."""

    name: str
    dataset: str
    subtask: str
    task: str
    labels: Any
    reference_f1: float | None


def find_units(index: Index, split: str) -> dict[str, Unit]:
    """Every unit that has samples in ``split``, by name."""
    units = {}
    for name in index.units(split):
        dataset, subtask = name.split("/")
        entry = index.dataset(dataset)
        reference = entry.reference_f1.get(subtask)
        units[name] = Unit(name, dataset, subtask, entry.task, entry.labels[subtask], reference)
    return units
