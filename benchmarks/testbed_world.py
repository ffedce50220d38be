"""The testbed's datasets: five of three tasks, large and small, drawn by a seeded generator for the demo base.

Every answer rests on one hidden fact, of which of four classes a name is. Names of the gazetteer have it for ever, in
all datasets, so that knowing them transfers; of the others only the picture tells it, by its icon. What differs is what
a task makes of it: under ``conflict`` each task calls the classes by the same four words in an order of its own, and
two datasets keep the first word of a name out of its span. Under ``control`` all agree, and all else is the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_clorae.data.demo import pictures, world
from lvlm_clorae.data.shards import DatasetSpec, ShardWriter

Sample = dict[str, Any]

WORDS = ("person", "location", "organization", "miscellaneous")
"""What the tasks call the classes: entity types, relations and event types."""
ICONS = ("person", "tower", "badge", "trophy")
"""What pictures show of them."""
GAZETTEER = {name: number % len(ICONS) for number, name in enumerate(world.LAST)}
"""Names whose class is a fact."""
UNCLEAR = world.AMBIGUOUS
"""Names whose class the picture tells."""

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
    """What the datasets make of the classes.

    Args:
        shift: task -> by how many places its words are turned against the classes
        bare: the datasets whose spans leave out a name's first word
    """

    shift: dict[str, int]
    bare: frozenset[str]

    def word(self, task: str, kind: int) -> str:
        return WORDS[(kind + self.shift[task]) % len(WORDS)]


VARIANTS = {
    "conflict": Variant({"mner": 0, "mre": 1, "mee": 2}, frozenset({"wire", "events"})),
    "control": Variant({"mner": 0, "mre": 0, "mee": 0}, frozenset()),
}


@dataclass(frozen=True)
class Dataset:
    """One dataset.

    Args:
        templates: its texts; what is in capitals is filled in
        annotate: makes the annotation of the text's mentions, by what they fill
        labels: as in index.json
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


def draw(name: str, variant: Variant, rng: random.Random) -> tuple[Sample, bytes | None]:
    """One sample of a dataset in the schema of docs/architecture.md, and the bytes of its picture or None.

    In half of the samples the picture tells the class, in half the gazetteer. A fifth of the relations are none: an
    unclear name and no icon.
    """
    dataset = DATASETS[name]
    kind: int | None = rng.randrange(len(ICONS))
    pictured = rng.random() < 0.5
    if dataset.task == "mre" and rng.random() < 0.2:
        kind, pictured = None, True
    known = [one for one, its in GAZETTEER.items() if its == kind]
    things = rng.sample(world.SCENERY, rng.randrange(0, 2))
    if pictured and kind is not None:
        things.insert(rng.randrange(len(things) + 1), ICONS[kind])

    filled = {
        "NAME": rng.choice(UNCLEAR if pictured else known),
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

    picture, boxes = pictures.draw(things, rng) if things else (None, [])
    objects = [{"id": f"O{number}", "box": box, "label": ""} for number, box in enumerate(boxes, start=1)]
    shown = f"O{things.index(ICONS[kind]) + 1}" if pictured and kind is not None else None
    word = None if kind is None else variant.word(dataset.task, kind)
    sample: Sample = {
        "dataset": name,
        "task": dataset.task,
        "text": " ".join(tokens),
        "tokens": tokens,
        "image": "drawn.png" if picture else None,
        "objects": objects if dataset.task == "mee" else [],
        **dataset.annotate(found, word, shown),
    }
    return sample, picture


def build(directory: Path, variant: str, seed: int, task: str | None = None) -> None:
    """Write the shards of a variant, of a task or all, the same for the same seed. Raises UserError as ShardWriter."""
    for name, dataset in DATASETS.items():
        if task not in (None, dataset.task):
            continue
        reference = dict.fromkeys(dataset.labels, 90.0)
        spec = DatasetSpec(name, dataset.task, tuple(dataset.labels), dataset.labels, reference)
        with ShardWriter(directory, spec) as writer:
            for split, size in dataset.sizes.items():
                rng = random.Random(f"{seed}/{name}/{split}")  # both variants have the same texts and pictures
                for number in range(size):
                    writer.add(split, f"{name}_{split}_{number:04d}", *draw(name, VARIANTS[variant], rng))
