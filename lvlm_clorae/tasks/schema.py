"""Tasks, sub-tasks, the literal markers of prompts and answers, and what a sound sample is (docs/architecture.md)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lvlm_clorae.errors import UserError, nearest

Sample = Mapping[str, Any]
Labels = Sequence[str] | Mapping[str, Sequence[str]]

SPOT = "<spot>"
"""Stands between the pieces of an answer."""
EVENT = "<event>"
"""Stands between the events of an argument answer."""
REGION = "<region>"
"""Stands in a prompt where the model puts the features of one object."""
NONE = "none"
"""The answer when there is nothing to find, and the relation that is no relation."""

_MARKERS = (SPOT, EVENT, REGION)
_OBJECT_ID = re.compile(r"O[1-9][0-9]*")
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True)
class Task:
    """One task, which has one C-LoRAE expert (METHOD 1), and the sub-tasks its samples are asked."""

    name: str
    subtasks: tuple[str, ...]


TASKS = {
    task.name: task
    for task in (Task("mner", ("entity",)), Task("mre", ("relation",)), Task("mee", ("trigger", "argument")))
}
SUBTASKS = tuple(subtask for task in TASKS.values() for subtask in task.subtasks)

ANNOTATIONS = {"entity": "entities", "relation": "relation", "trigger": "events", "argument": "events"}
"""Sub-task -> the key of a sample that answers it."""


def is_task_name(name: object) -> bool:
    """Whether `name` is one of `TASKS` or can name a user's own task: letters, digits, "_" and "-", at most 40."""
    return isinstance(name, str) and _TASK_NAME.fullmatch(name) is not None


def in_task_order(names: Iterable[str]) -> list[str]:
    """The different `names`, those of `TASKS` first and in its order, then users' own, sorted."""
    found = set(names)
    return [*(name for name in TASKS if name in found), *sorted(found - set(TASKS))]


def subtasks_of(task: str) -> tuple[str, ...]:
    """The sub-tasks that a dataset of `task` may have: those of `TASKS`, and any for a user's own task."""
    return TASKS[task].subtasks if task in TASKS else SUBTASKS


def missing_annotations(sample: Sample, subtasks: Iterable[str]) -> list[str]:
    """The keys that `subtasks` ask for and `sample` has not, sorted. A task of `TASKS` cannot lack one and be sound."""
    return sorted({ANNOTATIONS[subtask] for subtask in subtasks if subtask in ANNOTATIONS} - set(sample))


def plain(text: str) -> str:
    """`text` on one line, single-spaced, with the markers broken up: ``<spot>`` becomes ``< spot >``.

    Dataset and user text goes through here on its way into prompts, answers and gold tuples alike. So a tweet that
    contains a marker can forge neither a region nor a separator, and an answer always reads back as it was written.
    """
    for marker in _MARKERS:
        text = text.replace(marker, f"< {marker[1:-1]} >")
    return " ".join(text.split())


def is_label(name: object) -> bool:
    """Whether `name` can stand in an answer: not empty, no commas, no markers and no stray spaces."""
    return isinstance(name, str) and name != "" and "," not in name and name == plain(name)


def check_subtask(subtask: str) -> None:
    """Raises UserError, with the nearest valid name, unless `subtask` is one of `SUBTASKS`."""
    if subtask not in SUBTASKS:
        raise UserError(f'There is no sub-task "{subtask}".{nearest(subtask, SUBTASKS)}')


def label_sets(subtask: str, labels: Labels) -> dict[str, list[str]]:
    """The label lists of a sub-task by heading: `types`, `relations`, or `types` and `roles` for arguments.

    `labels` is as in index.json: a list of names, and for arguments ``{"types": [...], "roles": [...]}``.
    Raises UserError for an unknown sub-task and for labels of another form.
    """
    check_subtask(subtask)
    if subtask == "argument":
        if isinstance(labels, Mapping) and all(_is_names(labels.get(key)) for key in ("types", "roles")):
            return {"types": list(labels["types"]), "roles": list(labels["roles"])}
        raise UserError('The labels of "argument" must be {"types": [...], "roles": [...]}: two lists of names.')
    if isinstance(labels, Mapping) or not _is_names(labels):
        raise UserError(f'The labels of "{subtask}" must be a list of names, as in index.json.')
    return {"relations" if subtask == "relation" else "types": list(labels)}


def check_sample(sample: object) -> list[str]:
    """Why `sample` is no sound sample of its task; empty when it is. Never raises, whatever the JSON value.

    Sound is what the prompts, answers and scores of this package rely on: tokens that make up the text, mentions that
    equal the tokens of their half-open span, unique object ids O1, O2 ... with finite boxes x1 < x2 and y1 < y2,
    arguments whose objects exist, and labels that can stand in an answer. Of a task of `TASKS` only its own annotation
    is looked at; a sample of a user's own task has at least one of entities, relation and events, and all it has count.
    """
    if not isinstance(sample, dict):
        return [f"a sample is an object, not {_kind(sample)}"]
    return _Check(sample).faults


class _Check:
    """One pass over one sample; `faults` has the reasons, each with the place it is about."""

    def __init__(self, sample: dict[str, Any]) -> None:
        self.faults: list[str] = []
        self.tokens: list[str] | None = None
        self.ids: set[str] = set()
        self.frame(sample)
        self.objects(sample.get("objects", []))
        for annotation in self.annotations(sample):
            if annotation == "entities":
                for where, entity in self.records("entities", sample.get("entities")):
                    self.label(f"{where}.type", entity.get("type"))
                    self.mention(where, entity)
            elif annotation == "relation":
                self.relation(sample.get("relation"))
            else:
                for where, event in self.records("events", sample.get("events")):
                    self.event(where, event)

    def annotations(self, sample: dict[str, Any]) -> list[str]:
        """The keys that must hold sound annotation."""
        task, known = sample.get("task"), list(dict.fromkeys(ANNOTATIONS.values()))
        if not self.expect(is_task_name(task), "task", f"{', '.join(TASKS)} or a plain name", task):
            return []
        if task in TASKS:
            return list(dict.fromkeys(ANNOTATIONS[subtask] for subtask in TASKS[task].subtasks))
        found = [key for key in known if key in sample]
        if not found:
            self.faults.append(f"a sample of task {task} has at least one of {', '.join(known)}")
        return found

    def expect(self, sound: bool, where: str, what: str, value: object) -> bool:
        if not sound:
            self.faults.append(f"{where}: must be {what}, not {_kind(value)}")
        return sound

    def records(self, where: str, value: object) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each record of a list, with the name of its place."""
        if self.expect(isinstance(value, list), where, "a list", value):
            for number, item in enumerate(cast("list[Any]", value)):
                name = f"{where}[{number}]"
                if self.expect(isinstance(item, dict), name, "an object", item):
                    yield name, item

    def frame(self, sample: dict[str, Any]) -> None:
        dataset, image, tokens = sample.get("dataset"), sample.get("image"), sample.get("tokens")
        self.expect(isinstance(dataset, str) and bool(dataset.strip()), "dataset", "a name", dataset)
        self.expect(image is None or (isinstance(image, str) and bool(image)), "image", "a file name or null", image)
        self.expect(isinstance(sample.get("source", {}), dict), "source", "an object", sample.get("source"))
        if not _is_names(tokens):
            self.expect(False, "tokens", "a list of strings", tokens)
            return
        self.tokens = cast("list[str]", tokens)
        if sample.get("text") != " ".join(self.tokens):
            self.faults.append("text: must be the tokens joined by single spaces")

    def objects(self, objects: object) -> None:
        for where, item in self.records("objects", objects):
            name, box, label = item.get("id"), item.get("box"), item.get("label", "")
            if not (isinstance(name, str) and _OBJECT_ID.fullmatch(name)):
                self.expect(False, f"{where}.id", "O1, O2 ...", name)
            elif name in self.ids:
                self.faults.append(f"{where}.id: {name} is there twice")
            else:
                self.ids.add(name)
            if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(map(_is_number, box))):
                self.faults.append(f"{where}.box: must be four finite numbers")
            elif not (box[0] < box[2] and box[1] < box[3]):
                self.faults.append(f"{where}.box: must have x1 < x2 and y1 < y2")
            self.expect(isinstance(label, str), f"{where}.label", "a string", label)

    def relation(self, relation: object) -> None:
        if not isinstance(relation, dict):
            self.expect(False, "relation", "an object", relation)
            return
        self.mention("relation.head", relation.get("head"))
        self.mention("relation.tail", relation.get("tail"))
        self.label("relation.label", relation.get("label"), may_be_none=True)

    def event(self, where: str, event: dict[str, Any]) -> None:
        self.label(f"{where}.type", event.get("type"))
        if "trigger" not in event:
            self.faults.append(f"{where}.trigger: is missing (null for an event seen only in the picture)")
        elif event["trigger"] is not None:
            self.mention(f"{where}.trigger", event["trigger"])
        for inner, argument in self.records(f"{where}.arguments", event.get("arguments")):
            self.label(f"{inner}.role", argument.get("role"))
            if "object" not in argument:
                self.mention(inner, argument)
                continue
            name = argument["object"]
            self.expect(isinstance(name, str) and name in self.ids, f"{inner}.object", "an object of the sample", name)
            if "text" in argument or "span" in argument:
                self.faults.append(f"{inner}: has both an object and a text; make two arguments of it")

    def mention(self, where: str, mention: object) -> None:
        if not isinstance(mention, dict):
            self.expect(False, where, "an object with text and span", mention)
            return
        text, span = mention.get("text"), mention.get("span")
        self.expect(isinstance(text, str) and bool(text.strip()), f"{where}.text", "a string that is not blank", text)
        if not (isinstance(span, (list, tuple)) and len(span) == 2 and all(type(offset) is int for offset in span)):
            self.faults.append(f"{where}.span: must be two token offsets")
        elif self.tokens is not None:
            start, end = span
            if not 0 <= start < end <= len(self.tokens):
                self.faults.append(f"{where}.span: is empty, reversed or outside the {len(self.tokens)} tokens")
            elif text != " ".join(self.tokens[start:end]):
                self.faults.append(f"{where}: the text is not that of the tokens in its span")

    def label(self, where: str, label: object, may_be_none: bool = False) -> None:
        self.expect(is_label(label), where, "a name without commas, markers and stray spaces", label)
        if isinstance(label, str) and label.casefold() == NONE and not may_be_none:
            self.faults.append(f'{where}: "{label}" is kept for the empty answer')


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_number(value: object) -> bool:
    # The comparison is false for nan and for infinity, and exact for an int that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _kind(value: object) -> str:
    """A short name for a value in a message; the repr of a nested or huge one can itself fail."""
    if isinstance(value, str):
        return repr(value[:60])
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
