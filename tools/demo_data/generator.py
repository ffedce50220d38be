"""Demo datasets: four of unequal size, of three tasks, with images that some answers depend on.

python -m tools.demo_data.generator --output_dir lvlm_clorae/data/demo
"""

import argparse
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lvlm_clorae.data.index import DatasetSpec, Index, load_index
from lvlm_clorae.data.writer import ShardWriter
from tools import exit_on_error
from tools.demo_data import images, world

Sample = dict[str, Any]
Written = tuple["_Writer", dict[str, Any], list[str]]
"""Text, annotation and the names of the icons in the image."""

SHARD_SAMPLES = 100  # few, so that most datasets have several shards, as real ones do

ENTITY_TYPES = ["person", "location", "organization", "miscellaneous"]


class _Writer:
    """Collects tokens and returns the spans of the texts that are added."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    def add(self, text: str) -> dict[str, Any]:
        """Append `text` and return it with its half-open token span."""
        words = text.split()
        start = len(self.tokens)
        self.tokens += words
        return {"text": " ".join(words), "span": [start, len(self.tokens)]}


def _name(entity_type: str, rng: random.Random) -> str:
    if entity_type == "person":
        return f"{rng.choice(world.FIRST)} {rng.choice(world.LAST)}" if rng.random() < 0.7 else rng.choice(world.FIRST)
    if entity_type == "location":
        return rng.choice(world.CITIES)
    if entity_type == "organization":
        return f"{rng.choice(world.ORG_HEADS)} {rng.choice(world.ORG_TAILS)}"
    return f"{rng.choice(world.WORK_HEADS)} {rng.choice(world.WORK_TAILS)}"


_SLOTS = {"PER": "person", "LOC": "location", "ORG": "organization", "MISC": "miscellaneous"}

POSTS = (
    "PER is coming to LOC tonight; so proud of PER at the MISC; PER joins ORG next month; stuck in LOC again; "
    "ORG opens a new office in LOC; watching the MISC with PER; my flight from LOC to LOC is late; "
    "nobody sings like PER; tickets for the MISC are gone; the queue at ORG is endless"
).split("; ")
AMBIGUOUS_POSTS = (
    "can not stop thinking about AMB; AMB was amazing today; so this is AMB then; miss you AMB; "
    "good morning from the AMB fans; everybody loves AMB"
).split("; ")
NEWS = (
    "On DAY PER , who leads ORG , arrived in LOC for the MISC .; Shares of ORG fell on DAY after PER resigned .; "
    "The mayor of LOC praised PER and ORG .; Organisers of the MISC in LOC thanked ORG .; "
    "PER and PER will open the MISC on DAY .; A court in LOC fined ORG on DAY ."
).split("; ")
AMBIGUOUS_NEWS = (
    "On DAY the name AMB was in every headline , said PER .; Reports about AMB reached LOC on DAY ."
).split("; ")
PAIRS = "PER and PER at the MISC; great evening for PER and PER; here are PER and PER in LOC".split("; ")
OTHER_PAIRS = {
    "member_of": "PER works for ORG; PER plays for ORG now",
    "place_of_residence": "PER lives in LOC; PER has a house in LOC",
    "place_of_birth": "PER was born in LOC; PER grew up in LOC",
    "held_in": "the MISC takes place in LOC; welcome to the MISC in LOC",
    "none": "PER flies over LOC; PER reads about ORG",
}


def _fill(template: str, writer: _Writer, rng: random.Random, ambiguous: str | None) -> list[dict[str, Any]]:
    """Write `template` and return its entities; ``AMB`` becomes an ambiguous name of type `ambiguous`."""
    entities = []
    for word in template.split():
        if word in _SLOTS:
            entities.append({"type": _SLOTS[word], **writer.add(_name(_SLOTS[word], rng))})
        elif word == "AMB":
            entities.append({"type": ambiguous, **writer.add(rng.choice(world.AMBIGUOUS))})
        else:
            writer.add(rng.choice(world.DAYS) if word == "DAY" else word)
    return entities


def _entities(plain: list[str], unclear: list[str], share: float, social: bool, rng: random.Random) -> Written:
    """Write a sentence, for a `share` of which the type of the name depends on the image."""
    writer = _Writer()
    if social and rng.random() < 0.3:
        writer.add(f"RT {rng.choice(world.HANDLES)} :")
    things = rng.sample(world.SCENERY, rng.randrange(0, 2))
    if rng.random() < share:
        entity_type = rng.choice(ENTITY_TYPES)
        entities = _fill(rng.choice(unclear), writer, rng, entity_type)
        things.append(world.TYPE_ICON[entity_type])
    else:
        entities = _fill(rng.choice(plain), writer, rng, None)
        if rng.random() < 0.5:
            things.append(world.TYPE_ICON[rng.choice(entities)["type"]])
    if social and rng.random() < 0.4:
        writer.add(rng.choice(world.TAGS))
    return writer, {"entities": entities}, things


def pairs(rng: random.Random) -> Written:
    """Write a relation of two names; three of four are between two people and depend on the image."""
    writer = _Writer()
    things = rng.sample(world.SCENERY, 1)
    if rng.random() < 0.75:
        frame = rng.choice(PAIRS)
        names = [entity for entity in _fill(frame, writer, rng, None) if entity["type"] == "person"]
        label = rng.choice(("none", *world.PAIR_ICON.values()))
        things += [icon for icon, meaning in world.PAIR_ICON.items() if meaning == label]
    else:
        choices = [(frame, label) for label, frames in OTHER_PAIRS.items() for frame in frames.split("; ")]
        frame, label = rng.choice(choices)
        names = _fill(frame, writer, rng, None)
    if rng.random() < 0.3:
        writer.add(rng.choice(world.TAGS))
    head, tail = ({"text": name["text"], "span": name["span"]} for name in names[:2])
    return writer, {"relation": {"head": head, "tail": tail, "label": label}}, things


def _event_clause(event_type: str, writer: _Writer, rng: random.Random) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write a clause with a trigger of the event type, and return the trigger and the text arguments."""
    trigger = rng.choice(world.EVENTS[event_type].triggers)
    noun = trigger in ("assault", "convoy", "custody", "protest", "talks", "summit")
    agent = rng.choice(world.GROUPS)
    if noun:
        writer.add("the" if event_type != "arrest" else "in")
        span = writer.add(trigger)
        writer.add("of")
    arguments = [{"role": "agent", **writer.add(agent)}]
    if not noun:
        span = writer.add(trigger)
    targets = {"attack": world.TARGETS, "transport": world.GOODS, "arrest": world.SUSPECTS}
    if event_type in targets:
        writer.add("with" if noun else "the")
        arguments.append({"role": "target", **writer.add(rng.choice(targets[event_type]))})
    elif event_type == "demonstrate":
        writer.add(f"over {rng.choice(world.CAUSES)}")
    if rng.random() < 0.6:
        writer.add("to" if event_type == "transport" else "in")
        role = "destination" if event_type == "transport" else "place"
        arguments.append({"role": role, **writer.add(rng.choice(world.CITIES))})
    writer.add(f"on {rng.choice(world.DAYS)} .")
    return span, arguments


def events(rng: random.Random) -> Written:
    """Write an event with text and visual arguments; in 40 % the event is only in the image."""
    writer = _Writer()
    event_type = rng.choice(world.EVENT_TYPES)
    things = rng.sample(world.SCENERY, rng.randrange(1, 4))
    if rng.random() < 0.4:
        writer.add(f"a picture from {rng.choice(world.CITIES)} this {rng.choice(world.DAYS)} .")
        event: dict[str, Any] = {"type": event_type, "trigger": None, "arguments": []}
        shown = True
    else:
        trigger, arguments = _event_clause(event_type, writer, rng)
        event = {"type": event_type, "trigger": trigger, "arguments": arguments}
        shown = rng.random() < 0.9
    if shown:
        icon = rng.choice(world.EVENTS[event_type].icons)
        things.insert(rng.randrange(len(things) + 1), icon)
        role = world.EVENTS[event_type].icon_role
        event["arguments"].append({"role": role, "object": f"O{things.index(icon) + 1}"})
    return writer, {"events": [event]}, things


class DemoDataset(NamedTuple):
    """A demo dataset: its writer, task, labels, reference F1 in percent, and number of samples per split."""

    write: Callable[[random.Random], Written]
    task: str
    labels: dict[str, Any]
    reference_f1: dict[str, float]
    sizes: dict[str, int]


_posts = partial(_entities, POSTS, AMBIGUOUS_POSTS, 0.75, True)
_news = partial(_entities, NEWS, AMBIGUOUS_NEWS, 0.2, False)
_MNER, _MRE = {"entity": ENTITY_TYPES}, {"relation": list(world.RELATIONS)}
_TYPES, _ROLES = list(world.EVENT_TYPES), list(world.ROLES)
_MEE = {"trigger": _TYPES, "argument": {"types": _TYPES, "roles": _ROLES}}
_MEE_F1 = {"trigger": 95.0, "argument": 85.0}
DATASETS = {
    "demo_posts": DemoDataset(_posts, "mner", _MNER, {"entity": 90.0}, {"train": 300, "dev": 50, "test": 50}),
    "demo_news": DemoDataset(_news, "mner", _MNER, {"entity": 90.0}, {"train": 100, "dev": 25, "test": 40}),
    "demo_pairs": DemoDataset(pairs, "mre", _MRE, {"relation": 90.0}, {"train": 330, "dev": 50, "test": 50}),
    "demo_events": DemoDataset(events, "mee", _MEE, _MEE_F1, {"train": 240, "dev": 50, "test": 50}),
}


def generate(dataset: str, rng: random.Random) -> tuple[Sample, bytes | None]:
    """Generate one sample of a demo dataset, with the bytes of its image or None."""
    spec = DATASETS[dataset]
    writer, annotation, things = spec.write(rng)
    common = {"dataset": dataset, "task": spec.task, "text": " ".join(writer.tokens), "tokens": writer.tokens}
    sample: Sample = {**common, "image": None, "objects": [], **annotation}
    if not things:
        return sample, None
    image, boxes = images.render(things, rng)
    sample["image"] = "drawn.png"
    if spec.task == "mee":
        sample["objects"] = [{"id": f"O{number}", "box": box, "label": ""} for number, box in enumerate(boxes, start=1)]
    return sample, image


def samples(dataset: str, split: str, seed: int) -> Iterator[tuple[str, Sample, bytes | None]]:
    """Generate (key, sample, image) of one split; the same seed gives the same samples on every machine."""
    rng = random.Random(f"{seed}/{dataset}/{split}")
    for number in range(DATASETS[dataset].sizes[split]):
        sample, image = generate(dataset, rng)
        sample["source"] = {"generator": "lvlm-clorae shards demo", "seed": seed, "number": number}
        yield f"{dataset}_{split}_{number:05d}", sample, image


def build_demo(output: Path, seed: int = 0) -> Index:
    """Add the demo datasets to the shards of `output`, and return its index. The same seed gives the same bytes."""
    for name, dataset in DATASETS.items():
        spec = DatasetSpec(name, dataset.task, tuple(dataset.labels), dataset.labels, dataset.reference_f1)
        with ShardWriter(output, spec, max_samples=SHARD_SAMPLES) as writer:
            for split in dataset.sizes:
                for key, sample, image in samples(name, split, seed):
                    writer.add(split, key, sample, image)
    return load_index(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="directory of the new shards")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")
    arguments = parser.parse_args()
    with exit_on_error():
        build_demo(arguments.output_dir, arguments.seed)
