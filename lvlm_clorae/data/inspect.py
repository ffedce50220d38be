"""What is in a directory of shards: counts, labels and lengths of each split, and a single sample without the rest."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from re import fullmatch
from typing import TYPE_CHECKING, Any

from lvlm_clorae.data.index import DatasetEntry, Index, load_index
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.tasks.schema import ANNOTATIONS, label_sets, subtasks_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

PERCENTS = (50, 90, 99)

# What the label lists of index.json count; a trigger and an argument are asked of the same events.
_KINDS = {
    ("entity", "types"): "entity_types",
    ("relation", "relations"): "relations",
    ("trigger", "types"): "event_types",
    ("argument", "types"): "event_types",
    ("argument", "roles"): "argument_roles",
}


@dataclass
class SplitStatistics:
    """Counts of one split: `size` in bytes, `lengths` samples by number of tokens, `labels` uses of labels by kind.

    `missing_pictures` are those that a sample names and its shard has not; a sample may also have none on purpose.
    """

    shards: int
    size: int
    labels: dict[str, Counter[str]]
    samples: int = 0
    pictures: int = 0
    missing_pictures: int = 0
    objects: int = 0
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, sample: Mapping[str, Any], image: bytes | None) -> None:
        """Count one sound sample."""
        self.samples += 1
        self.pictures += image is not None
        self.missing_pictures += image is None and sample["image"] is not None
        self.objects += len(sample.get("objects", []))
        self.lengths[len(sample["tokens"])] += 1
        for kind, label in _labels_of(sample):
            self.labels.setdefault(kind, Counter())[label] += 1

    def percentiles(self) -> dict[str, int]:
        """Tokens a sample: ``p50``, ``p90``, ``p99`` by nearest rank (so many percent have no more) and ``max``."""
        found = {}
        for percent in PERCENTS:
            below = 0
            for length in sorted(self.lengths):
                below += self.lengths[length]
                if below * 100 >= percent * self.samples:
                    found[f"p{percent}"] = length
                    break
        return {**found, "max": max(self.lengths)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the counts, ``tokens`` with the percentiles, ``labels`` by kind in the index's order."""
        return {
            "samples": self.samples,
            "shards": self.shards,
            "bytes": self.size,
            "pictures": self.pictures,
            "missing_pictures": self.missing_pictures,
            "objects": self.objects,
            "tokens": self.percentiles(),
            "labels": {kind: dict(counts) for kind, counts in self.labels.items()},
        }


@dataclass(frozen=True)
class DatasetStatistics:
    """The chosen splits of one dataset; `labels` is what the index lists, by kind."""

    task: str
    labels: Mapping[str, list[str]]
    splits: dict[str, SplitStatistics]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"task": self.task, "splits": {name: split.to_dict() for name, split in self.splits.items()}}


@dataclass(frozen=True)
class FoundSample:
    """A sample and where it lies: `number` counts from 0 in the chosen datasets and splits."""

    number: int
    dataset: str
    split: str
    shard: str
    key: str
    sample: dict[str, Any] = field(repr=False)
    image: bytes | None = field(repr=False)
    labels: Mapping[str, list[str]] = field(repr=False)

    def to_json(self) -> str:
        """The sample for a reader's eyes, still JSON: short values on one line, nothing a terminal would obey."""
        first = {name: getattr(self, name) for name in ("number", "dataset", "split", "shard", "key")}
        first["picture_bytes"] = None if self.image is None else len(self.image)
        first |= {name: self.sample[name] for name in ("task", "text", "tokens")}
        text = _readable({**first, **self.sample})
        # An unpaired surrogate cannot be printed, and an escape or a hidden space must be seen.
        return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def gather(directory: Path, dataset: str | None = None, split: str | None = None) -> dict[str, DatasetStatistics]:
    """The statistics of each chosen dataset and split, in one pass over their shards.

    Raises UserError for an unknown dataset or split, and for what `load_index` and `read_samples` refuse.
    """
    index = load_index(directory)
    found: dict[str, DatasetStatistics] = {}
    for entry, name in _choose(index, dataset, split):
        known, shards = known_labels(entry), entry.splits[name]
        labels = {kind: Counter(dict.fromkeys(names, 0)) for kind, names in known.items()}
        statistics = SplitStatistics(len(shards), sum(shard.bytes for shard in shards), labels)
        with _unreadable_is_told(directory):
            for _, sample, image in read_samples(directory, index, entry.name, name):
                statistics.add(sample, image)
        found.setdefault(entry.name, DatasetStatistics(entry.task, known, {})).splits[name] = statistics
    return found


def find_sample(directory: Path, wanted: str, dataset: str | None = None, split: str | None = None) -> FoundSample:
    """The sample with number or key `wanted`, reading no other. ``7`` is a number, ``007`` and ``7a`` are keys.

    Numbers count from 0 in the index's order (datasets by name, train before dev before test) of what is chosen.
    Raises UserError where there is none or, for a key, several; for an unknown dataset or split; and for a sample that
    cannot be read there.
    """
    index = load_index(directory)
    chosen = _choose(index, dataset, split)
    total = sum(entry.samples(name) for entry, name in chosen)
    numbers = [int(wanted)] if fullmatch("0|[1-9][0-9]{0,17}", wanted) else list(_with_key(directory, chosen, wanted))
    if len(numbers) > 1:
        raise UserError(f'The key "{wanted}" is there {len(numbers)} times. Choose with --dataset and --split.')
    if not numbers or numbers[0] >= total:
        where = ", ".join(f"{entry.name}/{name}" for entry, name in chosen)
        raise UserError(f"No sample {wanted} in {where}. Numbers go from 0 to {total - 1}, or give a key.")
    entry, name, place = _place(chosen, numbers[0])
    raw = ShardReader(index, directory).read(entry.name, name, place)
    return FoundSample(numbers[0], entry.name, name, *raw, known_labels(entry))


def known_labels(entry: DatasetEntry) -> dict[str, list[str]]:
    """The dataset's labels by what they count (`entity_types`, `relations`, `event_types`, `argument_roles`)."""
    found: dict[str, list[str]] = {}
    for subtask in entry.subtasks:
        for heading, names in label_sets(subtask, entry.labels[subtask]).items():
            known = found.setdefault(_KINDS[subtask, heading], [])
            known += [name for name in names if name not in known]
    return found


def sound_annotations(sample: Mapping[str, Any]) -> dict[str, Any]:
    """`entities`, `relation` and `events` as far as `check_sample` looks at them: what else there is may be unsound."""
    keys = dict.fromkeys(ANNOTATIONS[subtask] for subtask in subtasks_of(sample["task"]))
    return {key: sample[key] for key in keys if key in sample}


def printable(text: str) -> str:
    """`text` with U+FFFD for each character that has no look: controls, unpaired surrogates, line breaks."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def render(statistics: Mapping[str, DatasetStatistics], width: int) -> Group:
    """The statistics as tables for a console so wide: for each dataset its splits, then each kind of label."""
    from rich.console import Group
    from rich.filesize import decimal

    tables: list[Table | str] = []
    for name, dataset in statistics.items():
        splits = _table(f"{name} ({dataset.task})")
        counts = ("samples", "shards", "size", "pictures", "missing", "objects")
        tokens = [f"p{percent}" for percent in PERCENTS]
        for heading in (*counts, f"tokens {tokens[0]}", *tokens[1:], "max"):
            splits.add_column(heading, justify="right", overflow="fold")
        for split, of in dataset.splits.items():
            values = (of.pictures, of.missing_pictures, of.objects, *of.percentiles().values())
            before = (f"{of.samples:,}", f"{of.shards:,}", decimal(of.size))
            splits.add_row(split, *before, *(f"{value:,}" for value in values))
        tables += [splits, ""]
        for kind in dict.fromkeys(kind for of in dataset.splits.values() for kind in of.labels):
            uses = {split: of.labels.get(kind, Counter[str]()) for split, of in dataset.splits.items()}
            title = f"{name}: {kind.replace('_', ' ')}"
            tables += [_histogram(title, uses, dataset.labels.get(kind, []), width), ""]
    return Group(*tables[:-1])


def _table(title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 1, 0, 0))
    made.add_column("", overflow="fold")
    return made


def _histogram(title: str, uses: Mapping[str, Counter[str]], known: Sequence[str], width: int) -> Table:
    """How often each split uses each label, with a bar where there is room for one."""
    from rich.bar import Bar
    from rich.text import Text

    names = dict.fromkeys(label for counts in uses.values() for label in counts)
    labels = {name: printable(name) + ("" if name in known else " (not in the index)") for name in names}
    digits = max(len(f"{count:,}") for counts in uses.values() for count in [*counts.values(), 0])
    columns = max(digits, len("train")) + len(" 100.0% ") + 1
    bar = min(16, (width - max(map(len, labels.values()), default=0) - 1) // len(uses) - columns)
    histogram = _table(title)
    for split in uses:
        histogram.add_column(split, justify="right", overflow="fold")
        histogram.add_column("", justify="right", overflow="fold")
        if bar >= 4:
            histogram.add_column("")
    for name, label in labels.items():
        cells: list[Text | Bar] = [Text(label)]
        for counts in uses.values():
            cells += [Text(f"{counts[name]:,}"), Text(f"{counts[name] / max(counts.total(), 1):.1%}")]
            if bar >= 4:
                cells.append(Bar(max(*counts.values(), 1), 0, counts[name], width=bar))
        histogram.add_row(*cells)
    return histogram


def _choose(index: Index, dataset: str | None, split: str | None) -> list[tuple[DatasetEntry, str]]:
    entries = list(index.datasets.values()) if dataset is None else [index.dataset(dataset)]
    present = {name for entry in entries for name in entry.splits}
    if split is not None and split not in present:
        whose = "these shards" if dataset is None else f'dataset "{dataset}"'
        raise UserError(f'There is no split "{split}" in {whose}.{nearest(split, present)}')
    return [(entry, name) for entry in entries for name in entry.splits if split in (None, name)]


def _labels_of(sample: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, label) of each label in a sound sample."""
    found = sound_annotations(sample)
    yield from (("entity_types", entity["type"]) for entity in found.get("entities", []))
    if "relation" in found:
        yield "relations", found["relation"]["label"]
    for event in found.get("events", []):
        yield "event_types", event["type"]
        yield from (("argument_roles", argument["role"]) for argument in event["arguments"])


def _with_key(directory: Path, chosen: list[tuple[DatasetEntry, str]], key: str) -> Iterator[int]:
    """The numbers of the samples with that key, from the file names with which their tar headers begin."""
    begin = os.fsencode(f"{key}.json") + b"\0"
    number = 0
    for entry, name in chosen:
        for shard in entry.splits[name]:
            with _unreadable_is_told(directory), open(directory / shard.name, "rb") as handle:
                for offset in shard.offsets:
                    if os.pread(handle.fileno(), len(begin), offset) == begin:
                        yield number
                    number += 1


def _place(chosen: list[tuple[DatasetEntry, str]], number: int) -> tuple[DatasetEntry, str, Place]:
    for entry, name in chosen:
        for place, shard in enumerate(entry.splits[name]):
            if number < shard.samples:
                return entry, name, Place(place, number)
            number -= shard.samples
    raise IndexError(number)


@contextmanager
def _unreadable_is_told(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be read ({error.strerror}).") from None


def _readable(value: Any, indent: str = "", width: int = 110) -> str:
    """JSON whose lists and objects are on one line where they fit, and lists of plain values filled like a text."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or (indent and len(indent) + len(line) <= width):
        return line
    deeper = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_readable(item, deeper)}" for key, item in value.items()]
    else:
        parts = [_readable(item, deeper) for item in value]
    lines = [""]
    for number, part in enumerate(parts):
        ended = part + ("," if number < len(parts) - 1 else "")
        plain = isinstance(value, list) and not isinstance(value[number], (dict, list))
        if plain and lines[-1] and len(deeper) + len(lines[-1]) + 1 + len(ended) <= width:
            lines[-1] += f" {ended}"
        else:
            lines.append(ended)
    brackets = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([brackets[0], *(deeper + line for line in lines[1:]), indent + brackets[1]])
