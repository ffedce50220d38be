"""Statistics of shards per dataset and split, and lookup of a single sample."""

from __future__ import annotations

import json
import os
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from re import fullmatch
from typing import TYPE_CHECKING, Any

from lvlm_clorae.data.index import DatasetEntry, Index, ShardEntry, load_index
from lvlm_clorae.data.reader import read_sample, read_samples
from lvlm_clorae.data.storage import LocalStorage
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.files import file_errors
from lvlm_clorae.tasks.schema import label_sets, sample_labels

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

PERCENTS = (50, 90, 99)

_GROUPS = {
    ("entity", "types"): "entity_types",
    ("relation", "relations"): "relations",
    ("link", "relations"): "relations",
    ("trigger", "types"): "event_types",
    ("argument", "types"): "event_types",
    ("argument", "roles"): "argument_roles",
}
"""(sub-task, heading of `label_sets`) -> label group; triggers and arguments are labels of the same events."""


@dataclass
class SplitStatistics:
    """Counts of one split, of each label by label group, and of samples by number of tokens (`lengths`).

    A missing image is one that a sample names but its shard does not contain.
    """

    counts: Counter[str]
    labels: dict[str, Counter[str]]
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, sample: Mapping[str, Any], image: bytes | None) -> None:
        """Count one valid sample."""
        missing = image is None and sample["image"] is not None
        objects = len(sample.get("objects", []))
        self.counts.update(samples=1, images=image is not None, missing_images=missing, objects=objects)
        self.lengths[len(sample["tokens"])] += 1
        for subtask, heading, label in sample_labels(sample):
            if (subtask, heading) != ("argument", "types"):  # counted as the trigger's
                self.labels.setdefault(_GROUPS[subtask, heading], Counter())[label] += 1

    def percentiles(self) -> dict[str, int]:
        """Return ``p50``, ``p90``, ``p99`` (nearest rank) and ``max`` of the tokens per sample."""
        lengths = sorted(self.lengths.elements())
        ranks = {f"p{percent}": -(-percent * len(lengths) // 100) for percent in PERCENTS}
        return {**{name: lengths[rank - 1] for name, rank in ranks.items()}, "max": lengths[-1]}

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, token percentiles and labels as plain data for JSON."""
        labels = {group: dict(counts) for group, counts in self.labels.items()}
        return {**self.counts, "tokens": self.percentiles(), "labels": labels}


@dataclass(frozen=True)
class DatasetStatistics:
    """The selected splits of one dataset; `labels` are those of the index by label group."""

    task: str
    labels: Mapping[str, list[str]]
    splits: dict[str, SplitStatistics]

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as plain data for JSON."""
        return {"task": self.task, "splits": {name: split.to_dict() for name, split in self.splits.items()}}


@dataclass(frozen=True)
class FoundSample:
    """A sample and its location; `number` counts from 0 in the selected datasets and splits."""

    number: int
    dataset: str
    split: str
    shard: str
    key: str
    sample: dict[str, Any] = field(repr=False)
    image: bytes | None = field(repr=False)
    labels: Mapping[str, list[str]] = field(repr=False)

    def to_json(self) -> str:
        """Return readable JSON: a line for each field or object, and nothing that a terminal would interpret."""
        first = {name: getattr(self, name) for name in ("number", "dataset", "split", "shard", "key")}
        first["image_bytes"] = None if self.image is None else len(self.image)
        first |= {name: self.sample[name] for name in ("task", "text", "tokens")}
        fields = (f'  "{name}": {_format_value(value)}' for name, value in {**first, **self.sample}.items())
        text = "{\n" + ",\n".join(fields) + "\n}"
        # Unpaired surrogates cannot be printed; control characters and invisible spaces are escaped to be seen.
        return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def gather(directory: Path, dataset: str | None = None, split: str | None = None) -> dict[str, DatasetStatistics]:
    """Collect statistics in one pass over the shards. Raises UserError for an unknown selection or invalid shards."""
    index = load_index(directory)
    statistics: dict[str, DatasetStatistics] = {}
    for entry, name in _select(index, dataset, split):
        known, shards = known_labels(entry), entry.splits[name]
        labels = {group: Counter(dict.fromkeys(names, 0)) for group, names in known.items()}
        counts = {"samples": 0, "shards": len(shards), "bytes": sum(shard.bytes for shard in shards)}
        found = SplitStatistics(Counter({**counts, "images": 0, "missing_images": 0, "objects": 0}), labels)
        for _, sample, image in read_samples(directory, index, entry.name, name):
            found.add(sample, image)
        statistics.setdefault(entry.name, DatasetStatistics(entry.task, known, {})).splits[name] = found
    return statistics


def find_sample(directory: Path, wanted: str, dataset: str | None = None, split: str | None = None) -> FoundSample:
    """Find a sample by number or key without reading others: ``7`` is a number, ``007`` and ``7a`` are keys.

    Numbers count from 0 in the order of the index (datasets by name, train before dev before test) over the selection.
    Raises UserError without exactly one such sample, for an unknown dataset or split, and for an unreadable sample.
    """
    selected = _select(load_index(directory), dataset, split)
    shards = [(entry, name, shard) for entry, name in selected for shard in entry.splits[name]]
    starts = [0, *accumulate(shard.samples for _, _, shard in shards)]
    if fullmatch("0|[1-9][0-9]{0,17}", wanted):
        numbers = [int(wanted)]
    else:
        places = ((start, directory / shard.name, shard) for start, (_, _, shard) in zip(starts, shards, strict=False))
        numbers = [start + number for start, path, shard in places for number in _with_key(path, shard, wanted)]
    if len(numbers) > 1:
        raise UserError(f'{len(numbers)} samples have the key "{wanted}". Select one with --dataset and --split.')
    if not numbers or numbers[0] >= starts[-1]:
        where = ", ".join(f"{entry.name}/{name}" for entry, name in selected)
        raise UserError(f"There is no sample {wanted} in {where}. Give a number from 0 to {starts[-1] - 1} or a key.")
    place = bisect(starts, numbers[0]) - 1
    entry, name, shard = shards[place]
    found = read_sample(LocalStorage(directory), shard, numbers[0] - starts[place])
    return FoundSample(numbers[0], entry.name, name, shard.name, *found, known_labels(entry))


def known_labels(entry: DatasetEntry) -> dict[str, list[str]]:
    """Return the labels of the index by group: `entity_types`, `relations`, `event_types`, `argument_roles`."""
    labels: dict[str, list[str]] = {}
    for subtask in entry.subtasks:
        for heading, names in label_sets(subtask, entry.labels[subtask]).items():
            group = labels.setdefault(_GROUPS[subtask, heading], [])
            group += [name for name in names if name not in group]
    return labels


def printable(text: str) -> str:
    """Replace characters that cannot be displayed (controls, unpaired surrogates, line breaks) by U+FFFD."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def tables(statistics: Mapping[str, DatasetStatistics], width: int) -> Group:
    """Format the statistics for a console of `width` columns: a table of splits per dataset, then of labels."""
    from rich.console import Group
    from rich.filesize import decimal

    found: list[Table | str] = []
    for name, dataset in statistics.items():
        splits = _table(f"{name} ({dataset.task})")
        for heading in "samples shards size images missing objects tokens_p50 p90 p99 max".split():
            splits.add_column(heading.replace("_", " "), justify="right", overflow="fold")
        for split, of in dataset.splits.items():
            values = {name: f"{value:,}" for name, value in {**of.counts, **of.percentiles()}.items()}
            splits.add_row(split, *{**values, "bytes": decimal(of.counts["bytes"])}.values())
        found += [splits, ""]
        for group in dict.fromkeys(group for of in dataset.splits.values() for group in of.labels):
            counters = {split: of.labels.get(group, Counter[str]()) for split, of in dataset.splits.items()}
            title = f"{name}: {group.replace('_', ' ')}"
            found += [_histogram(title, counters, dataset.labels.get(group, []), width), ""]
    return Group(*found[:-1])


def _table(title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    return table


def _histogram(title: str, counters: Mapping[str, Counter[str]], known: Sequence[str], width: int) -> Table:
    """Build the table of label counts per split, with a bar if the width allows."""
    from rich.bar import Bar
    from rich.text import Text

    names = dict.fromkeys(label for counts in counters.values() for label in counts)
    labels = {name: printable(name) + ("" if name in known else " (not in the index)") for name in names}
    digits = max(len(f"{count:,}") for counts in counters.values() for count in [*counts.values(), 0])
    columns = max(digits, len("train")) + len(" 100.0% ") + 1
    bar = min(16, (width - max(map(len, labels.values()), default=0) - 1) // len(counters) - columns)
    histogram = _table(title)
    for split in counters:
        for heading in (split, "", "")[: 3 if bar >= 4 else 2]:
            histogram.add_column(heading, justify="right", overflow="fold")
    for name, label in labels.items():
        cells: list[Text | Bar] = [Text(label)]
        for counts in counters.values():
            cells += [Text(f"{counts[name]:,}"), Text(f"{counts[name] / max(counts.total(), 1):.1%}")]
            cells += [Bar(max(*counts.values(), 1), 0, counts[name], width=bar)] if bar >= 4 else []
        histogram.add_row(*cells)
    return histogram


def _select(index: Index, dataset: str | None, split: str | None) -> list[tuple[DatasetEntry, str]]:
    entries = list(index.datasets.values()) if dataset is None else [index.dataset(dataset)]
    present = {name for entry in entries for name in entry.splits}
    if split is not None and split not in present:
        where = "these shards" if dataset is None else f'dataset "{dataset}"'
        raise UserError(f'There is no split "{split}" in {where}.{nearest(split, present)}')
    return [(entry, name) for entry in entries for name in entry.splits if split in (None, name)]


def _with_key(path: Path, shard: ShardEntry, key: str) -> list[int]:
    """Return the numbers of the samples with a key, from the file names at the beginning of their tar headers."""
    begin = os.fsencode(f"{key}.json") + b"\0"
    with file_errors(f"{path}: cannot be read"), open(path, "rb") as handle:
        headers = [os.pread(handle.fileno(), len(begin), offset) for offset in shard.offsets]
    return [number for number, header in enumerate(headers) if header == begin]


def _format_value(value: Any) -> str:
    """Format JSON on one line, or for a list of objects with a line for each."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return json.dumps(value, ensure_ascii=False)
    return "[\n    " + ",\n    ".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n  ]"
