"""A user's own dataset, in this project's own form of a sample (shards/README.md), so that it needs no code.

The folder has train.jsonl, dev.jsonl (or valid.jsonl) and test.jsonl, or some of them: a JSON object a line, of which
what can be told from the rest may be left out:

    {"text": "Ann Lee sings", "image": "1.jpg", "entities": [{"type": "person", "text": "Ann Lee"}]}

- ``text`` without ``tokens`` is split at white space, ``tokens`` without ``text`` are joined by single spaces;
- a mention may give its span alone, or its text alone where that stands in the tokens exactly once;
- objects without ids are O1, O2 ... in their order; an event's arguments may be left out where it has none.

What the dataset is, is said by dataset.json beside them, or gathered from the records where that is silent: ``name``,
``task``, ``subtasks``, ``labels`` and ``reference_f1``, as in index.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert.common import (
    BuildReport,
    Converted,
    Pictures,
    Place,
    make_key,
    make_sample,
    mention,
    parse_json,
    picture_name,
    places,
    read_bounded,
    read_lines,
    token_list,
)
from lvlm_clorae.data.shards import MAX_JSON_BYTES, DatasetSpec
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.tasks.schema import (
    ANNOTATIONS,
    SUBTASKS,
    TASKS,
    check_sample,
    is_label,
    is_task_name,
    label_sets,
    subtasks_of,
)

FILES = {"train": ("train.jsonl",), "dev": ("dev.jsonl", "valid.jsonl"), "test": ("test.jsonl",)}
DESCRIPTION = "dataset.json"

_SETTINGS = ("name", "task", "subtasks", "labels", "reference_f1")
_KEYS = ("dataset", "task", "text", "tokens", "image", "objects", "entities", "relation", "events", "source")


class JsonLines:
    """The converter of one folder (see `Converter`); `name` comes before the name in dataset.json.

    Raises UserError, when made, for a folder without such files, a dataset.json of another form, and records that leave
    open what it does not say: a task, or labels.
    """

    def __init__(self, input_dir: Path, name: str | None = None) -> None:
        self._paths = _find(input_dir)
        told = _read_description(input_dir / DESCRIPTION)
        task = told.get("task") or self._task_of_records()
        try:
            draft = DatasetSpec(name or told.get("name") or input_dir.resolve().name, task, (), {}, {})
        except UserError as error:
            raise UserError(f"{error} Give it another with --name.") from None
        self.SPEC = self._describe(draft, told, input_dir / DESCRIPTION)

    def convert(self, input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
        """The records of train, dev and test in the files' order."""
        pictures = Pictures(images, report)
        for split, place, line in self._lines():
            if report.full(split):
                continue
            sample = report.attempt(_sample, self.SPEC, line, place, place=place, record=line)
            if sample is not None:
                image = sample["image"]
                key = make_key(place["line"], Path(image).stem if image else "text")
                yield split, key, sample, pictures.read(image) if image else None

    def _lines(self) -> Iterator[tuple[str, Place, str]]:
        for split, path in self._paths.items():
            for number, line in enumerate(read_lines(path), 1):
                if line.strip():
                    yield split, {"file": path.name, "line": number}, line

    def _task_of_records(self) -> str:
        """The task that the first readable record names, or that its one annotation belongs to."""
        for _, _, line in self._lines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(record, dict):
                continue
            if is_task_name(record.get("task")):
                return str(record["task"])
            annotated = [name for name, task in TASKS.items() if ANNOTATIONS[task.subtasks[0]] in record]
            if len(annotated) == 1:
                return annotated[0]
            break
        names = ", ".join(path.name for path in self._paths.values())
        raise UserError(
            f"{names}: the first record leaves the dataset's task open. Give it in {DESCRIPTION} as "
            f'{{"task": "..."}}: {", ".join(TASKS)}, or a name of your own.'
        )

    def _describe(self, draft: DatasetSpec, told: dict[str, Any], where: Path) -> DatasetSpec:
        """`draft` with sub-tasks, labels and reference F1: those told, and the rest from the records."""
        possible = subtasks_of(draft.task)
        for subtask in (*told.get("subtasks", ()), *told.get("labels", {}), *told.get("reference_f1", {})):
            if subtask not in possible:
                raise UserError(
                    f'{where}: "{subtask}" is no sub-task of {draft.task}.{nearest(str(subtask), possible)}'
                )
        scratch = BuildReport(draft.name)
        labels = {**self._gather(draft, scratch), **told.get("labels", {})}
        known = [subtask for subtask in SUBTASKS if all(label_sets(subtask, labels[subtask]).values())]
        subtasks = tuple(told.get("subtasks") or [subtask for subtask in possible if subtask in known])
        lacking = [subtask for subtask in subtasks if subtask not in known]
        if lacking or not subtasks:
            message = (
                f"{where.parent}: no record has a label for {' and '.join(lacking or possible)}, so nothing is asked."
            )
            for first in scratch.rejected[:1]:
                message += f" First record at fault: {first.file}, line {first.line}: {first.reason}."
            raise UserError(f"{message} Mend the records, or give the labels in {DESCRIPTION}.")
        chosen = {subtask: labels[subtask] for subtask in subtasks}
        return replace(draft, subtasks=subtasks, labels=chosen, reference_f1=told.get("reference_f1", {}))

    def _gather(self, draft: DatasetSpec, scratch: BuildReport) -> dict[str, Any]:
        """The label sets of all sub-tasks, sorted, from the sound records; the others are rejected in `scratch`."""
        asked = {ANNOTATIONS[subtask] for subtask in subtasks_of(draft.task)}
        entities: set[str] = set()
        relations: set[str] = set()
        events: set[str] = set()
        roles: set[str] = set()
        for _, place, line in self._lines():
            sample = scratch.attempt(_sample, draft, line, place, place=place, record="")
            if sample is None:
                continue
            faults = check_sample(sample)
            if faults:
                scratch.reject(place, "; ".join(faults[:3]), "")
                continue
            for key in asked & set(sample):
                if key == "entities":
                    entities.update(item["type"] for item in sample[key])
                elif key == "relation":
                    relations.add(sample[key]["label"])
                else:
                    events.update(event["type"] for event in sample[key])
                    roles.update(item["role"] for event in sample[key] for item in event["arguments"])
        return {
            "entity": sorted(entities),
            "relation": sorted(relations),
            "trigger": sorted(events),
            "argument": {"types": sorted(events), "roles": sorted(roles)},
        }


def _find(input_dir: Path) -> dict[str, Path]:
    """The file of each split that there is."""
    if not input_dir.is_dir():
        raise UserError(f"{input_dir}: no such directory. Give the one that has your train.jsonl.")
    found = {
        split: [input_dir / name for name in names if (input_dir / name).is_file()] for split, names in FILES.items()
    }
    if not any(found.values()):
        names = ", ".join(name for names in FILES.values() for name in names)
        raise UserError(f"{input_dir}: none of {names} in it. shards/README.md shows the form of their lines.")
    return {split: paths[0] for split, paths in found.items() if paths}


def _read_description(path: Path) -> dict[str, Any]:
    """The checked settings of dataset.json; none where it is not there."""
    if not path.is_file():
        return {}
    told: dict[str, Any] = parse_json(read_bounded(path), str(path), dict)
    for key in told:
        if key not in _SETTINGS:
            raise UserError(f'{path}: unknown setting "{key}".{nearest(key, _SETTINGS)}')
    name, task, subtasks = told.get("name", "a"), told.get("task", "a"), told.get("subtasks", ["entity"])
    labels, reference = told.get("labels", {}), told.get("reference_f1", {})
    if not isinstance(name, str):
        raise UserError(f'{path}: "name" must be a name.')
    if not is_task_name(task):
        raise UserError(f'{path}: "task" must be {", ".join(TASKS)}, or a name of letters, digits, "_" and "-".')
    if not (isinstance(subtasks, list) and subtasks and all(isinstance(item, str) for item in subtasks)):
        raise UserError(f'{path}: "subtasks" must be a list of some of {", ".join(SUBTASKS)}.')
    if not isinstance(labels, dict):
        raise UserError(f'{path}: "labels" must be an object of label sets by sub-task.')
    for subtask, names in labels.items():
        wrong = [label for found in label_sets(subtask, names).values() for label in found if not is_label(label)]
        if wrong:
            raise UserError(f'{path}: the label "{wrong[0]}" of {subtask} has a comma, a marker or a stray space.')
    if not (isinstance(reference, dict) and all(_is_percent(value) for value in reference.values())):
        raise UserError(f'{path}: "reference_f1" must give percents above 0 by sub-task.')
    return told


def _is_percent(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 100


def _sample(spec: DatasetSpec, line: str, place: Place) -> dict[str, Any]:
    """The sample of one line, what was left out filled in; whether it is sound is checked by `build`."""
    if len(line) > MAX_JSON_BYTES:
        raise ValueError(f"the line has {len(line)} characters")
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for key in record:
        if key not in _KEYS:
            raise ValueError(f'unknown key "{key}".{nearest(key, _KEYS)}')
    if record.get("task", spec.task) != spec.task:
        raise ValueError(f'its task is not the dataset\'s, which is "{spec.task}"')
    tokens, image, source = _tokens(record), record.get("image"), record.get("source", {})
    if not (image is None or isinstance(image, str)):
        raise ValueError("image: must be a file name or null")
    if not isinstance(source, dict):
        raise ValueError("source: must be an object")
    return make_sample(
        spec,
        tokens,
        {**source, **place},
        image=None if image is None else picture_name(image),
        objects=[{"id": f"O{number}", "label": "", **item} for number, item in _items(record, "objects", 1)],
        **_annotations(record, tokens),
    )


def _tokens(record: dict[str, Any]) -> list[str]:
    text = record.get("text")
    if not (text is None or isinstance(text, str)):
        raise ValueError("text: must be a string")
    if "tokens" not in record:
        if text is None and record.get("image") is None:
            raise ValueError("there is neither a text nor tokens nor an image")
        return (text or "").split()
    tokens = token_list(record["tokens"])
    if text is not None and text != " ".join(tokens):
        raise ValueError("text: must be the tokens joined by single spaces; leave one of the two out")
    return tokens


def _annotations(record: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "entities" in record:
        found["entities"] = [_mention(tokens, item, f"entities[{n}]") for n, item in _items(record, "entities")]
    if "relation" in record:
        relation = record["relation"]
        if not isinstance(relation, dict):
            raise ValueError("relation: must be an object")
        ends = {end: _mention(tokens, relation.get(end), f"relation.{end}") for end in ("head", "tail")}
        found["relation"] = {**relation, **ends}
    if "events" in record:
        found["events"] = [_event(tokens, event, f"events[{n}]") for n, event in _items(record, "events")]
    return found


def _event(tokens: list[str], event: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = [_mention(tokens, item, f"{where}.arguments[{n}]") for n, item in _items(event, "arguments")]
    trigger = {"trigger": _mention(tokens, event["trigger"], f"{where}.trigger")} if "trigger" in event else {}
    return {**event, **trigger, "arguments": arguments}


def _items(record: dict[str, Any], key: str, start: int = 0) -> list[tuple[int, dict[str, Any]]]:
    """(number, item) of the list of objects under `key`, which may be left out."""
    value = record.get(key, [])
    if not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise ValueError(f"{key}: must be a list of objects")
    return list(enumerate(value, start))


def _mention(tokens: list[str], item: Any, where: str) -> Any:
    """`item` with the text or span that it leaves out; as it is where it leaves out both or is no mention."""
    if not isinstance(item, dict) or "object" in item:
        return item
    text, span = item.get("text"), item.get("span")
    if span is None and isinstance(text, str):
        spans = places(tokens, text)
        if len(spans) != 1:
            raise ValueError(f'{where}: "{text[:60]}" stands {len(spans)} times among the tokens; give its span')
        return {**item, **mention(tokens, *spans[0])}
    if text is None and isinstance(span, list) and len(span) == 2:
        return {**item, **mention(tokens, *span)}
    return item
