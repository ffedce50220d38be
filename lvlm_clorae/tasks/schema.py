"""Tasks, sub-tasks, the markers of prompts and answers, and the sample format with its validation."""

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lvlm_clorae.errors import UserError, nearest

Sample = Mapping[str, Any]
Labels = Sequence[str] | Mapping[str, Sequence[str]]

SPOT = "<spot>"  # separates the pieces of an answer
EVENT = "<event>"  # separates the events of an argument answer, and the links of a link answer
REGION = "<region>"  # position in a prompt at which the model inserts the features of one object
CAPTION = "caption"  # the task of image captions, its sub-task, and its annotation in a sample
NONE = "none"  # the answer without any tuple, and the label of two names without a relation

MAX_DEPTH = 32
"""Nesting of lists and objects in a sample."""

BOX_TOLERANCE = 2.0
"""Pixels by which a box can exceed its image: annotation tools count pixels from 0 or from 1 and round."""

_MARKERS = (SPOT, EVENT, REGION)
LAYOUT_SIZE = 100
"""Coordinates of a layout box: 0 is the left or upper edge of the page, 99 the right or lower one."""

_OBJECT_ID = re.compile(r"O[1-9][0-9]*")
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


TASKS: dict[str, tuple[str, ...]] = {"mner": ("entity",), "mre": ("relation",), "mee": ("trigger", "argument")}
"""Task, which has one C-LoRAE expert -> the sub-tasks of its samples."""
SUBTASKS = (*(subtask for subtasks in TASKS.values() for subtask in subtasks), "link")
"""Those of `TASKS`, and `link` for user-defined tasks: all relations of a text, of which no name is given. `CAPTION` is
none of them: its prompt is empty, its answer free text."""

ANNOTATIONS = {
    "entity": "entities",
    "relation": "relation",
    "trigger": "events",
    "argument": "events",
    "link": "links",
    CAPTION: CAPTION,
}
"""Sub-task -> the key of a sample that has its annotation."""


KEYS = (
    "dataset",
    "task",
    "image",
    "text",
    "tokens",
    "layout",
    "objects",
    *dict.fromkeys(ANNOTATIONS.values()),
    "source",
)
"""Keys of a sample."""


def is_task_name(name: object) -> bool:
    """Return whether `name` can name a task: at most 40 letters, digits, "_" and "-"."""
    return isinstance(name, str) and _TASK_NAME.fullmatch(name) is not None


def in_task_order(names: Iterable[str]) -> list[str]:
    """Return the distinct names: those of `TASKS` first and in its order, then user-defined tasks, sorted."""
    distinct = set(names)
    return [*(name for name in TASKS if name in distinct), *sorted(distinct - set(TASKS))]


def subtasks_of(task: str) -> tuple[str, ...]:
    """Return the sub-tasks that a dataset of `task` can have: all of extraction for a user-defined task."""
    return (CAPTION,) if task == CAPTION else TASKS.get(task, SUBTASKS)


def missing_annotations(sample: Sample, subtasks: Iterable[str]) -> list[str]:
    """Return the annotation keys that `subtasks` need and `sample`, of a user-defined task, does not have, sorted."""
    return sorted({ANNOTATIONS[subtask] for subtask in subtasks if subtask in ANNOTATIONS} - set(sample))


def plain(text: str) -> str:
    """Return `text` on one line with single spaces and with markers split: ``<spot>`` becomes ``< spot >``.

    All text passes through here into prompts, answers and gold tuples, so a marker in a tweet creates neither a region
    nor a separator, and a parsed answer equals the tuples it was formatted from.
    """
    for marker in _MARKERS:
        text = text.replace(marker, f"< {marker[1:-1]} >")
    return " ".join(text.split())


def is_encodable(text: str) -> bool:
    """Return whether `text` can be encoded as UTF-8, which unpaired surrogates cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_label(name: object) -> bool:
    """Return whether `name` can be a label in an answer: printable, not empty, no commas, markers or extra spaces."""
    return isinstance(name, str) and name != "" and name.isprintable() and "," not in name and name == plain(name)


def check_subtask(subtask: str) -> None:
    """Raise UserError, with the nearest valid name, unless `subtask` is one of `SUBTASKS` or `CAPTION`."""
    if subtask not in SUBTASKS and subtask != CAPTION:
        raise UserError(f'Unknown sub-task "{subtask}".{nearest(subtask, SUBTASKS)}')


def label_sets(subtask: str, labels: Labels) -> dict[str, list[str]]:
    """Return the label lists of a sub-task by heading: `types`, `relations`, `types` and `roles`; captions have none.

    `labels` has the form of index.json: a list of names, or ``{"types": [...], "roles": [...]}`` for arguments.
    Raises UserError for an unknown sub-task and for labels of another form.
    """
    check_subtask(subtask)
    if subtask == CAPTION:
        return {}
    if subtask == "argument":
        if isinstance(labels, Mapping) and all(_are_distinct(labels.get(key)) for key in ("types", "roles")):
            return {"types": list(labels["types"]), "roles": list(labels["roles"])}
        raise UserError(
            'The labels of "argument" must be {"types": [...], "roles": [...]}: two lists of different names.'
        )
    if isinstance(labels, Mapping) or not _are_distinct(labels):
        raise UserError(f'The labels of "{subtask}" must be a list of different names, as in index.json.')
    return {"relations" if subtask in ("relation", "link") else "types": list(labels)}


def box_problem(box: Any, size: tuple[int, int] | None = None) -> str | None:
    """Return why ``box`` is no box x1, y1, x2, y2 in pixels; None if it is one.

    Args:
        size: width and height of the upright image, which the box may exceed by ``BOX_TOLERANCE``; None if unknown
    """
    if not (isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_number, box))):
        return f"{str(box)[:60] if _is_flat(box) else _describe(box)} must be four finite numbers: x1, y1, x2, y2"
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):
        return f"{list(box)} must have x1 < x2 and y1 < y2"
    width, height = size or (math.inf, math.inf)
    if (outside := max(-x1, -y1, x2 - width, y2 - height)) > BOX_TOLERANCE:
        return f"{list(box)} is {outside:g} pixels outside the {'{}x{} '.format(*size) if size else ''}image"
    return None


def checked_annotations(sample: Sample) -> dict[str, Any]:
    """Return the annotations that `check_sample` validates; another annotation of a sample can have any form."""
    keys = dict.fromkeys(ANNOTATIONS[subtask] for subtask in subtasks_of(sample["task"]))
    return {key: sample[key] for key in keys if key in sample}


def sample_labels(sample: Sample) -> Iterator[tuple[str, str, str]]:
    """Yield (sub-task, heading of `label_sets`, label) of each label in a valid sample."""
    annotations = checked_annotations(sample)
    for entity in annotations.get("entities", ()):
        yield "entity", "types", entity["type"]
    if "relation" in annotations:
        yield "relation", "relations", annotations["relation"]["label"]
    for link in annotations.get("links", ()):
        yield "link", "relations", link["label"]
    for event in annotations.get("events", ()):
        yield "trigger", "types", event["type"]
        yield "argument", "types", event["type"]
        for argument in event["arguments"]:
            yield "argument", "roles", argument["role"]


def unknown_labels(sample: Sample, labels: Mapping[str, Any]) -> list[str]:
    """Return ``sub-task "label"`` of each label of a valid sample that is not in the dataset's labels, sorted."""
    known = {subtask: label_sets(subtask, labels[subtask]) for subtask in set(SUBTASKS) & set(labels)}
    found = [item for item in sample_labels(sample) if item[0] in known]
    return sorted({f'{name} "{label}"' for name, heading, label in found if label not in known[name][heading]})


def check_sample(sample: object) -> list[str]:
    """Validate a sample and return its problems; an empty list if it is valid. No JSON value raises.

    In a valid sample the tokens make up the text, mentions equal the tokens of their half-open span, object ids are
    unique (O1, O2 ...) with finite boxes x1 < x2 and y1 < y2, the objects of arguments exist, and labels can occur in
    an answer. An entity or an end of a link with ``"verbatim": False`` has a text that differs from the tokens of its
    span, or is in none, and then no span. For a task of `TASKS` only its own annotation is validated. A sample of a
    user-defined task has at least one of entities, relation, events and links, and all of them are validated.
    """
    if not isinstance(sample, dict):
        return [f"a sample must be an object, not {_describe(sample)}"]
    found = {str(key)[:60]: _json_problem([key, value]) for key, value in sample.items()}
    return _SampleCheck(sample).problems or [f"{key}: {problem}" for key, problem in found.items() if problem]


def _json_problem(value: object) -> str | None:
    """Return why a value, whatever its keys, cannot be stored as JSON or sent between processes; None if it can."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list | tuple):
                inner += value
            elif isinstance(value, str):
                if not is_encodable(value):
                    return f"{value[:60]!r} has unpaired surrogates, which cannot be encoded as UTF-8"
            elif not (value is None or isinstance(value, bool) or _is_number(value)):
                return f"{_describe(value)} is neither text, a finite number, true, false, null, a list nor an object"
        if not inner:
            return None
        level = inner
    return f"is nested more than {MAX_DEPTH} levels deep"


class _SampleCheck:
    """Validation of one sample; `problems` has one message for each, which begins with its location."""

    def __init__(self, sample: dict[str, Any]) -> None:
        self.problems: list[str] = []
        self.tokens: list[str] | None = None
        self.ids: set[str] = set()
        self.common_fields(sample)
        for where, item in self.objects_of("objects", sample.get("objects", [])):
            self.box(where, item)
        self.layout(sample.get("layout", []))
        checks = {"entities": self.entities, "relation": self.relation, "events": self.events, "links": self.links}
        checks |= {CAPTION: self.caption}
        for annotation in self.annotations(sample):
            checks[annotation](sample.get(annotation))

    def annotations(self, sample: dict[str, Any]) -> list[str]:
        """Return the keys whose annotation has to be valid."""
        task = sample.get("task")
        if not self.expect(is_task_name(task), "task", f"{', '.join(TASKS)} or a plain name", task):
            return []
        known = list(dict.fromkeys(ANNOTATIONS[subtask] for subtask in subtasks_of(str(task))))
        if task in TASKS or task == CAPTION:
            return known
        present = [key for key in known if key in sample]
        if not present:
            self.problems.append(f"a sample of task {task} needs at least one of {', '.join(known)}")
        return present

    def known(self, where: str, item: dict[str, Any], *keys: str) -> None:
        """Report keys without a meaning, whose content would be lost."""
        unknown = [f"{_describe(key)} ({nearest(str(key), keys).strip()})" for key in item if key not in keys]
        self.problems += [f"{where}: has the unknown key {key}" for key in unknown]

    def expect(self, valid: bool, where: str, expected: str, value: object) -> bool:
        if not valid:
            self.problems.append(f"{where}: must be {expected}, not {_describe(value)}")
        return valid

    def objects_of(self, where: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (location, item) of each JSON object in a list."""
        if self.expect(isinstance(value, list), where, "a list", value):
            for number, item in enumerate(value):
                if self.expect(isinstance(item, dict), f"{where}[{number}]", "an object", item):
                    yield f"{where}[{number}]", item

    def common_fields(self, sample: dict[str, Any]) -> None:
        self.known("sample", sample, *KEYS)
        dataset, image, tokens = sample.get("dataset"), sample.get("image"), sample.get("tokens")
        self.expect(_is_text(dataset), "dataset", "a name", dataset)
        self.expect(image is None or (isinstance(image, str) and bool(image)), "image", "a file name or null", image)
        self.expect(isinstance(sample.get("source", {}), dict), "source", "an object", sample.get("source"))
        if self.expect(is_names(tokens), "tokens", "a list of strings", tokens):
            self.tokens = list(tokens or ())
            text = " ".join(self.tokens)
            if sample.get("text") != text:
                self.problems.append("text: must be the tokens joined by single spaces")

    def box(self, where: str, item: dict[str, Any]) -> None:
        self.known(where, item, "id", "box", "label")
        name, box, label = item.get("id"), item.get("box"), item.get("label", "")
        valid = isinstance(name, str) and _OBJECT_ID.fullmatch(name) is not None
        if self.expect(valid, f"{where}.id", "O1, O2 ...", name):
            if name in self.ids:
                self.problems.append(f"{where}.id: {name} occurs twice")
            self.ids.add(str(name))
        if problem := box_problem(box):
            self.problems.append(f"{where}.box: {problem}")
        self.expect(isinstance(label, str), f"{where}.label", "a string", label)

    def layout(self, layout: Any) -> None:
        """Check the boxes of consecutive parts of the text."""
        end = 0
        for where, item in self.objects_of("layout", layout):
            self.known(where, item, "span", "box")
            box: Any = item.get("box")
            problem = self.span_problem(item.get("span"), end)
            if problem:
                self.problems.append(f"{where}.span: {problem}")
            else:
                end = item["span"][1]
            numbers = isinstance(box, list) and len(box) == 4 and all(type(edge) is int for edge in box)
            valid = numbers and all(0 <= edge < LAYOUT_SIZE for edge in box) and box[0] <= box[2] and box[1] <= box[3]
            self.expect(valid, f"{where}.box", f"x1 <= x2 and y1 <= y2, integers from 0 to {LAYOUT_SIZE - 1}", box)

    def entities(self, entities: Any) -> None:
        for where, entity in self.objects_of("entities", entities):
            self.label(f"{where}.type", entity.get("type"))
            self.mention(where, entity, "type", "verbatim")

    def links(self, links: Any) -> None:
        for where, link in self.objects_of("links", links):
            self.known(where, link, "head", "tail", "label")
            self.mention(f"{where}.head", link.get("head"), "verbatim")
            self.mention(f"{where}.tail", link.get("tail"), "verbatim")
            self.label(f"{where}.label", link.get("label"))

    def relation(self, relation: Any) -> None:
        if self.expect(isinstance(relation, dict), "relation", "an object", relation):
            self.known("relation", relation, "head", "tail", "label")
            self.mention("relation.head", relation.get("head"))
            self.mention("relation.tail", relation.get("tail"))
            self.label("relation.label", relation.get("label"), may_be_none=True)

    def events(self, events: Any) -> None:
        for where, event in self.objects_of("events", events):
            self.known(where, event, "type", "trigger", "arguments")
            self.label(f"{where}.type", event.get("type"))
            if "trigger" not in event:
                self.problems.append(f"{where}.trigger: is missing (null for an event seen only in the image)")
            elif event["trigger"] is not None:
                self.mention(f"{where}.trigger", event["trigger"])
            for inner, argument in self.objects_of(f"{where}.arguments", event.get("arguments")):
                self.argument(inner, argument)

    def argument(self, where: str, argument: dict[str, Any]) -> None:
        self.label(f"{where}.role", argument.get("role"))
        if "object" not in argument:
            self.mention(where, argument, "role")
            return
        self.known(where, argument, "role", "object", "text", "span")
        name = argument["object"]
        self.expect(isinstance(name, str) and name in self.ids, f"{where}.object", "an object of the sample", name)
        if "text" in argument or "span" in argument:
            self.problems.append(f"{where}: has both an object and a text; make two arguments of it")

    def caption(self, caption: Any) -> None:
        self.expect(_is_text(caption), CAPTION, "a string that is not blank", caption)

    def mention(self, where: str, mention: Any, *others: str) -> None:
        """Validate an object with text, span and the keys ``others``."""
        if not self.expect(isinstance(mention, dict), where, "an object with text and span", mention):
            return
        self.known(where, mention, "text", "span", *others)
        text, span, verbatim = mention.get("text"), mention.get("span"), mention.get("verbatim", True)
        self.expect(_is_text(text), f"{where}.text", "a string that is not blank", text)
        self.expect(isinstance(verbatim, bool), f"{where}.verbatim", "true or false", verbatim)
        if "span" not in mention and not verbatim:
            return
        if problem := self.span_problem(span):
            self.problems.append(f"{where}.span: {problem}")
        elif verbatim and self.tokens is not None and text != " ".join(self.tokens[slice(*span)]):
            self.problems.append(f"{where}.text: differs from the tokens of its span")

    def span_problem(self, span: Any, first: int = 0) -> str | None:
        """Return why ``span`` is no half-open span of the tokens from ``first`` on; None if it is one."""
        if not (isinstance(span, (list, tuple)) and len(span) == 2 and all(type(offset) is int for offset in span)):
            return "must be two token offsets"
        if self.tokens is not None and not first <= span[0] < span[1] <= len(self.tokens):
            before = f", or begins before {first}" if first else ""
            return f"is empty, reversed or outside the {len(self.tokens)} tokens{before}"
        return None

    def label(self, where: str, label: object, may_be_none: bool = False) -> None:
        self.expect(is_label(label), where, "a name without commas, markers and extra spaces", label)
        if isinstance(label, str) and label.casefold() == NONE and not may_be_none:
            self.problems.append(f'{where}: "{label}" is reserved for the empty answer')


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_names(value: object) -> bool:
    """Return whether `value` is a list of strings."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _are_distinct(value: Any) -> bool:
    """Return whether `value` is a list of different strings, of which at most one is a spelling of `NONE`."""
    return is_names(value) and len({NONE if item.casefold() == NONE else item for item in value}) == len(value)


def _is_number(value: object) -> bool:
    # The comparison is false for nan and infinity, and exact for an int that no float can represent.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_flat(value: object) -> bool:
    """Return whether this is a short list of numbers, which can be shown in a message."""
    return isinstance(value, list | tuple) and len(value) < 10 and all(map(_is_number, value))


def _describe(value: object) -> str:
    """Describe a value in a message; the repr of a nested or huge one can itself fail."""
    if isinstance(value, str):
        return repr(value[:60])
    return "null or missing" if value is None else f"a value of type {type(value).__name__}"
