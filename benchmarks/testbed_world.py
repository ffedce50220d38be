"""Synthetic datasets of the testbed with controlled label conflict: five datasets of three tasks for the demo base.

Every answer depends on the class of a name, one of four. Names of the gazetteer have the same class in all datasets, so
that knowledge of them transfers; the class of other names is shown only by an icon in the image. The variants differ in
the labels: under ``conflict`` each task assigns the same four words to the classes in its own order, and two datasets
leave the first word of a name out of its span. Under ``control`` all datasets agree. Everything else is equal. Under
``unequal`` they agree too, but of entities and of relations one dataset is large and easy (names of the gazetteer), and
one has a tenth of its samples and is hard (the image alone shows the class).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvlm_clorae.data.index import DatasetSpec
from lvlm_clorae.data.writer import ShardWriter
from tools.demo_data import images, world

Sample = dict[str, Any]

WORDS = ("person", "location", "organization", "miscellaneous")
"""Labels of the classes: entity types, relations and event types."""
ICONS = ("person", "tower", "badge", "trophy")
"""Icons of the classes in images."""
GAZETTEER = {name: number % len(ICONS) for number, name in enumerate(world.LAST)}
"""Classes of the names that have a fixed one."""
UNCLEAR = world.AMBIGUOUS
"""Names whose class only the image shows."""

POSTS = (
    "can not stop thinking about NAME",
    "NAME was amazing today",
    "so this is NAME then",
    "good morning from the NAME fans",
    "everybody loves NAME",
    "miss you NAME",
)
WIRE = (
    "On DAY the name NAME was in every headline .",
    "Reports about NAME reached CITY on DAY .",
    "Shares fell on DAY after NAME was heard of .",
    "A court in CITY spoke of NAME on DAY .",
)
PAIRS = ("great evening for FIRST and NAME", "here are FIRST and NAME in CITY", "FIRST and NAME at the Cup")
TIES = ("On DAY FIRST was seen with NAME in CITY .", "The mayor of CITY thanked FIRST and NAME on DAY .")
EVENTS = ("GROUP TRIGGER the NAME in CITY", "the NAME was TRIGGER by GROUP on DAY .", "GROUP TRIGGER NAME again")
TRIGGERS = ("bombed", "shelled", "raided", "shipped", "moved", "detained", "seized", "hosted")


@dataclass(frozen=True)
class Variant:
    """Assignment of labels to classes.

    Args:
        shift: rotation of the labels against the classes, by task
        bare: datasets whose spans leave out a name's first word
        shown: by dataset, the share of samples in which only the image shows the class; by default half
        train: by dataset, the number of training samples if it is not the dataset's
    """

    shift: dict[str, int]
    bare: frozenset[str] = frozenset()
    shown: dict[str, float] = field(default_factory=dict)
    train: dict[str, int] = field(default_factory=dict)

    def word(self, task: str, number: int) -> str:
        """The label of a class in a task."""
        return WORDS[(number + self.shift[task]) % len(WORDS)]


_AGREE = {"mner": 0, "mre": 0, "mee": 0}
VARIANTS = {
    "conflict": Variant({"mner": 0, "mre": 1, "mee": 2}, frozenset({"wire", "events"})),
    "control": Variant(_AGREE),
    "unequal": Variant(
        _AGREE,
        shown={"posts": 0.0, "pairs": 0.0, "wire": 1.0, "ties": 1.0},
        train={"wire": 40, "ties": 40},
    ),
}


@dataclass(frozen=True)
class Dataset:
    """One dataset.

    Args:
        task: name of the task
        templates: texts with placeholders in capitals
        annotate: function that makes the annotation from the mentions by placeholder
        labels: labels as in index.json
        sizes: samples by split
    """

    task: str
    templates: tuple[str, ...]
    annotate: Callable[[dict[str, Any], str | None, str | None], Sample]
    labels: dict[str, Any]
    sizes: dict[str, int]


def _entities(found: dict[str, Any], word: str | None, _: str | None) -> Sample:
    return {"entities": [{"type": word, **found["NAME"]}]}


def _relation(found: dict[str, Any], word: str | None, _: str | None) -> Sample:
    return {"relation": {"head": found["FIRST"], "tail": found["NAME"], "label": word or "none"}}


def _events(found: dict[str, Any], word: str | None, shown: str | None) -> Sample:
    arguments = [{"role": "agent", **found["GROUP"]}, {"role": "target", **found["NAME"]}]
    if shown:
        arguments.append({"role": "instrument", "object": shown})
    return {"events": [{"type": word, "trigger": found["TRIGGER"], "arguments": arguments}]}


_MNER = {"entity": list(WORDS)}
_MRE = {"relation": ["none", *WORDS]}
_MEE = {"trigger": list(WORDS), "argument": {"types": list(WORDS), "roles": ["agent", "target", "instrument"]}}
DATASETS = {
    "posts": Dataset("mner", POSTS, _entities, _MNER, {"train": 400, "dev": 50, "test": 100}),
    "wire": Dataset("mner", WIRE, _entities, _MNER, {"train": 80, "dev": 40, "test": 80}),
    "pairs": Dataset("mre", PAIRS, _relation, _MRE, {"train": 400, "dev": 50, "test": 100}),
    "ties": Dataset("mre", TIES, _relation, _MRE, {"train": 80, "dev": 40, "test": 80}),
    "events": Dataset("mee", EVENTS, _events, _MEE, {"train": 280, "dev": 50, "test": 80}),
}


def make_sample(name: str, variant: Variant, rng: random.Random) -> tuple[Sample, bytes | None]:
    """Generate a sample of a dataset in the schema of docs/architecture.md, and the bytes of its image or None.

    The image shows the class in half of the samples, or the variant's share; in the others the name is in the
    gazetteer. A fifth of the relations are none: an ambiguous name without an icon.
    """
    dataset = DATASETS[name]
    number: int | None = rng.randrange(len(ICONS))
    shown = rng.random() < variant.shown.get(name, 0.5)
    if dataset.task == "mre" and rng.random() < 0.2:
        number, shown = None, True
    known = [one for one, its in GAZETTEER.items() if its == number]
    things = rng.sample(world.SCENERY, rng.randrange(0, 2))
    if shown and number is not None:
        things.insert(rng.randrange(len(things) + 1), ICONS[number])

    filled = {
        "NAME": rng.choice(UNCLEAR if shown else known),
        "FIRST": rng.choice(world.FIRST),
        "CITY": rng.choice(world.CITIES),
        "DAY": rng.choice(world.DAYS),
        "GROUP": rng.choice(world.GROUPS),
        "TRIGGER": rng.choice(TRIGGERS),
    }
    before = rng.choice(world.FIRST) if rng.random() < 0.5 else None
    tokens: list[str] = []
    found: dict[str, Any] = {}
    for part in rng.choice(dataset.templates).split():
        start = len(tokens)
        if part == "NAME" and before:
            tokens.append(before)
            start += name in variant.bare
        tokens.append(filled.get(part, part))
        if part in filled:
            found[part] = {"text": " ".join(tokens[start:]), "span": [start, len(tokens)]}

    image, boxes = images.render(things, rng) if things else (None, [])
    objects = [{"id": f"O{order}", "box": box, "label": ""} for order, box in enumerate(boxes, start=1)]
    shown = f"O{things.index(ICONS[number]) + 1}" if shown and number is not None else None
    word = None if number is None else variant.word(dataset.task, number)
    sample: Sample = {
        "dataset": name,
        "task": dataset.task,
        "text": " ".join(tokens),
        "tokens": tokens,
        "image": "synthetic.png" if image else None,
        "objects": objects if dataset.task == "mee" else [],
        **dataset.annotate(found, word, shown),
    }
    return sample, image


def build(directory: Path, variant: str, seed: int, task: str | None = None) -> None:
    """Write the shards of a variant, of one task or all, as a function of the seed. Raises UserError as ShardWriter."""
    for name, dataset in DATASETS.items():
        if task not in (None, dataset.task):
            continue
        reference = dict.fromkeys(dataset.labels, 90.0)
        spec = DatasetSpec(name, dataset.task, tuple(dataset.labels), dataset.labels, reference)
        with ShardWriter(directory, spec) as writer:
            sizes = {**dataset.sizes, "train": VARIANTS[variant].train.get(name, dataset.sizes["train"])}
            for split, size in sizes.items():
                rng = random.Random(f"{seed}/{name}/{split}")  # texts and images are those of the other variant
                for number in range(size):
                    writer.add(split, f"{name}_{split}_{number:04d}", *make_sample(name, VARIANTS[variant], rng))
