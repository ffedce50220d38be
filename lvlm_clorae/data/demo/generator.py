"""Seeded samples of the demo datasets: four of unequal size, three tasks, pictures that some answers need."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import pictures, world

Sample = dict[str, Any]
Drawn = tuple[Sample, bytes | None]

ENTITY_TYPES = ["person", "location", "organization", "miscellaneous"]


class _Writer:
    """Collects tokens and remembers the spans of what it was asked to remember."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    def add(self, text: str) -> dict[str, Any]:
        """Append ``text`` and return it with its half-open token span."""
        words = text.split()
        start = len(self.tokens)
        self.tokens += words
        return {"text": " ".join(words), "span": [start, len(self.tokens)]}


def _name(kind: str, rng: random.Random) -> str:
    if kind == "person":
        return f"{rng.choice(world.FIRST)} {rng.choice(world.LAST)}" if rng.random() < 0.7 else rng.choice(world.FIRST)
    if kind == "location":
        return rng.choice(world.CITIES)
    if kind == "organization":
        return f"{rng.choice(world.ORG_HEADS)} {rng.choice(world.ORG_TAILS)}"
    return f"{rng.choice(world.WORK_HEADS)} {rng.choice(world.WORK_TAILS)}"


_SLOTS = {"PER": "person", "LOC": "location", "ORG": "organization", "MISC": "miscellaneous"}

POSTS = (
    "PER is coming to LOC tonight",
    "so proud of PER at the MISC",
    "PER joins ORG next month",
    "stuck in LOC again",
    "ORG opens a new office in LOC",
    "watching the MISC with PER",
    "my flight from LOC to LOC is late",
    "nobody sings like PER",
    "tickets for the MISC are gone",
    "the queue at ORG is endless",
)
AMBIGUOUS_POSTS = (
    "can not stop thinking about AMB",
    "AMB was amazing today",
    "so this is AMB then",
    "miss you AMB",
    "good morning from the AMB fans",
    "everybody loves AMB",
)
NEWS = (
    "On DAY PER , who leads ORG , arrived in LOC for the MISC .",
    "Shares of ORG fell on DAY after PER resigned .",
    "The mayor of LOC praised PER and ORG .",
    "Organisers of the MISC in LOC thanked ORG .",
    "PER and PER will open the MISC on DAY .",
    "A court in LOC fined ORG on DAY .",
)
AMBIGUOUS_NEWS = (
    "On DAY the name AMB was in every headline , said PER .",
    "Reports about AMB reached LOC on DAY .",
)


def _fill(template: str, writer: _Writer, rng: random.Random, ambiguous: str | None) -> list[dict[str, Any]]:
    """Write ``template``; returns its entities. ``AMB`` becomes an ambiguous name of type ``ambiguous``."""
    entities = []
    for word in template.split():
        if word in _SLOTS:
            entities.append({"type": _SLOTS[word], **writer.add(_name(_SLOTS[word], rng))})
        elif word == "AMB":
            entities.append({"type": ambiguous, **writer.add(rng.choice(world.AMBIGUOUS))})
        else:
            writer.add(rng.choice(world.DAYS) if word == "DAY" else word)
    return entities


def _entities(
    rng: random.Random, plain: tuple[str, ...], unclear: tuple[str, ...], share: float, social: bool
) -> tuple[_Writer, dict[str, Any], list[str]]:
    writer = _Writer()
    if social and rng.random() < 0.3:
        writer.add(f"RT {rng.choice(world.HANDLES)} :")
    things = rng.sample(world.SCENERY, rng.randrange(0, 2))
    if rng.random() < share:
        kind = rng.choice(ENTITY_TYPES)
        entities = _fill(rng.choice(unclear), writer, rng, kind)
        things.append(world.TYPE_ICON[kind])
    else:
        entities = _fill(rng.choice(plain), writer, rng, None)
        if rng.random() < 0.5:
            things.append(world.TYPE_ICON[rng.choice(entities)["type"]])
    if social and rng.random() < 0.4:
        writer.add(rng.choice(world.TAGS))
    return writer, {"entities": entities}, things


def posts(rng: random.Random) -> tuple[_Writer, dict[str, Any], list[str]]:
    """Social posts; in three of four the type of the name is in the picture only."""
    return _entities(rng, POSTS, AMBIGUOUS_POSTS, 0.75, social=True)


def news(rng: random.Random) -> tuple[_Writer, dict[str, Any], list[str]]:
    """Longer sentences, mostly clear without the picture."""
    return _entities(rng, NEWS, AMBIGUOUS_NEWS, 0.2, social=False)


def pairs(rng: random.Random) -> tuple[_Writer, dict[str, Any], list[str]]:
    """Relations of two names; in three of four between two people, and then in the picture only."""
    writer = _Writer()
    things = rng.sample(world.SCENERY, 1)
    if rng.random() < 0.75:
        frame = rng.choice(("PER and PER at the MISC", "great evening for PER and PER", "here are PER and PER in LOC"))
        names = [entity for entity in _fill(frame, writer, rng, None) if entity["type"] == "person"]
        label = rng.choice(("none", *world.PAIR_ICON.values()))
        things += [icon for icon, meaning in world.PAIR_ICON.items() if meaning == label]
    else:
        frame, label = rng.choice(
            (
                ("PER works for ORG", "member_of"),
                ("PER plays for ORG now", "member_of"),
                ("PER lives in LOC", "place_of_residence"),
                ("PER has a house in LOC", "place_of_residence"),
                ("PER was born in LOC", "place_of_birth"),
                ("PER grew up in LOC", "place_of_birth"),
                ("the MISC takes place in LOC", "held_in"),
                ("welcome to the MISC in LOC", "held_in"),
                ("PER flies over LOC", "none"),
                ("PER reads about ORG", "none"),
            )
        )
        names = _fill(frame, writer, rng, None)
    if rng.random() < 0.3:
        writer.add(rng.choice(world.TAGS))
    head, tail = ({"text": name["text"], "span": name["span"]} for name in names[:2])
    return writer, {"relation": {"head": head, "tail": tail, "label": label}}, things


def _event_clause(kind: str, writer: _Writer, rng: random.Random) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write one clause with a trigger of ``kind``; returns the trigger and the text arguments."""
    trigger = rng.choice(world.EVENTS[kind]["triggers"])
    noun = trigger in ("assault", "convoy", "custody", "protest", "talks", "summit")
    agent = rng.choice(world.GROUPS)
    arguments = []
    if noun:
        writer.add("the" if kind != "arrest" else "in")
        span = writer.add(trigger)
        writer.add("of")
        arguments.append({"role": "agent", **writer.add(agent)})
    else:
        arguments.append({"role": "agent", **writer.add(agent)})
        span = writer.add(trigger)
    if kind in ("attack", "transport", "arrest"):
        words = {"attack": world.TARGETS, "transport": world.GOODS, "arrest": world.SUSPECTS}[kind]
        writer.add("with" if noun else "the")
        arguments.append({"role": "target", **writer.add(rng.choice(words))})
    elif kind == "demonstrate":
        writer.add(f"over {rng.choice(world.CAUSES)}")
    if rng.random() < 0.6:
        writer.add("to" if kind == "transport" else "in")
        role = "destination" if kind == "transport" else "place"
        arguments.append({"role": role, **writer.add(rng.choice(world.CITIES))})
    writer.add(f"on {rng.choice(world.DAYS)} .")
    return span, arguments


def events(rng: random.Random) -> tuple[_Writer, dict[str, Any], list[str]]:
    """Events with text arguments and arguments that are boxes; in 40 % the event is in the picture only."""
    writer = _Writer()
    kind = rng.choice(world.EVENT_TYPES)
    things = rng.sample(world.SCENERY, rng.randrange(1, 4))
    if rng.random() < 0.4:
        writer.add(f"a picture from {rng.choice(world.CITIES)} this {rng.choice(world.DAYS)} .")
        event: dict[str, Any] = {"type": kind, "trigger": None, "arguments": []}
        shown = True
    else:
        trigger, arguments = _event_clause(kind, writer, rng)
        event = {"type": kind, "trigger": trigger, "arguments": arguments}
        shown = rng.random() < 0.9
    if shown:
        icon = rng.choice(world.EVENTS[kind]["icons"])
        things.insert(rng.randrange(len(things) + 1), icon)
        (role,) = world.EVENTS[kind]["icon_role"]
        event["arguments"].append({"role": role, "object": f"O{things.index(icon) + 1}"})
    return writer, {"events": [event]}, things


@dataclass(frozen=True)
class DemoDataset:
    """How one demo dataset is made: its writer, task, labels and the samples per split."""

    write: Callable[[random.Random], tuple[_Writer, dict[str, Any], list[str]]]
    task: str
    labels: dict[str, Any]
    reference_f1: dict[str, float]
    sizes: dict[str, int]


DATASETS = {
    "demo_posts": DemoDataset(
        posts, "mner", {"entity": ENTITY_TYPES}, {"entity": 90.0}, {"train": 300, "dev": 50, "test": 50}
    ),
    "demo_news": DemoDataset(
        news, "mner", {"entity": ENTITY_TYPES}, {"entity": 90.0}, {"train": 100, "dev": 25, "test": 40}
    ),
    "demo_pairs": DemoDataset(
        pairs, "mre", {"relation": list(world.RELATIONS)}, {"relation": 90.0}, {"train": 330, "dev": 50, "test": 50}
    ),
    "demo_events": DemoDataset(
        events,
        "mee",
        {
            "trigger": list(world.EVENT_TYPES),
            "argument": {"types": list(world.EVENT_TYPES), "roles": list(world.ROLES)},
        },
        {"trigger": 95.0, "argument": 85.0},
        {"train": 240, "dev": 50, "test": 50},
    ),
}


def draw_sample(dataset: str, rng: random.Random) -> Drawn:
    """One sample of ``dataset`` in the schema of docs/architecture.md, and the bytes of its picture or None."""
    spec = DATASETS[dataset]
    writer, annotation, things = spec.write(rng)
    sample: Sample = {
        "dataset": dataset,
        "task": spec.task,
        "text": " ".join(writer.tokens),
        "tokens": writer.tokens,
        "image": None,
        "objects": [],
        **annotation,
    }
    if not things:
        return sample, None
    picture, boxes = pictures.draw(things, rng)
    sample["image"] = "drawn.png"
    if spec.task == "mee":
        sample["objects"] = [{"id": f"O{number}", "box": box, "label": ""} for number, box in enumerate(boxes, start=1)]
    return sample, picture


def unlabelled(rng: random.Random) -> tuple[str, list[str], bytes | None, list[list[int]]]:
    """Text, the names of the things drawn, the picture and their boxes: no label; the demo base is pretrained on it."""
    spec = DATASETS[rng.choice(list(DATASETS))]
    writer, _, things = spec.write(rng)
    picture, boxes = pictures.draw(things, rng) if things else (None, [])
    return " ".join(writer.tokens), things, picture, boxes


def samples(dataset: str, split: str, seed: int) -> Iterator[tuple[str, Sample, bytes | None]]:
    """The samples ``(key, sample, picture)`` of one split; the same for the same seed on every machine."""
    rng = random.Random(f"{seed}/{dataset}/{split}")
    for number in range(DATASETS[dataset].sizes[split]):
        sample, picture = draw_sample(dataset, rng)
        sample["source"] = {"generator": "lvlm-clorae shards demo", "seed": seed, "number": number}
        yield f"{dataset}_{split}_{number:05d}", sample, picture
