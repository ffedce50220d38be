"""Datasets of the user's own, as JSON lines in the format of a sample, without any code.

shards/README.md ("Your own dataset") describes the files, the fields that may be omitted, and dataset.json.
"""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lvlm_clorae.data.convert import common
from lvlm_clorae.data.convert.common import BuildReport, Converter, Origin, Sample
from lvlm_clorae.data.index import DatasetSpec, Names, Percentage
from lvlm_clorae.data.reader import MAX_JSON_BYTES
from lvlm_clorae.errors import UserError, located, nearest
from lvlm_clorae.files import parse_json, validation_error
from lvlm_clorae.tasks import schema
from lvlm_clorae.tasks.schema import KEYS, SUBTASKS, TASKS, is_task_name, label_sets

FILES = {"train": ("train.jsonl",), "dev": ("dev.jsonl", "valid.jsonl"), "test": ("test.jsonl",)}
DESCRIPTION = "dataset.json"

_SETTINGS: dict[str, Any] = {
    "name": str,
    "task": str,
    "subtasks": Names,
    "labels": dict[str, Any],
    "reference_f1": dict[str, Percentage],
}
"""Setting of dataset.json -> its type."""


def folder_converter(input_dir: Path, name: str | None = None) -> Converter:
    """Build the converter of a directory; `name` takes precedence over the one in dataset.json.

    Raises UserError without such files, for an invalid dataset.json, and if the records do not determine what it omits.
    """
    paths, where = _find(input_dir), input_dir / DESCRIPTION
    settings = _read_settings(where)
    task = settings.get("task") or _task_of_records(paths)
    try:
        draft = DatasetSpec(name or settings.get("name") or input_dir.resolve().name, task, (), {}, {})
    except UserError as error:
        raise UserError(f"{error} Set another one with --name.") from None
    spec = _describe(draft, settings, where, paths)
    make = partial(_sample, spec)
    return Converter(spec, lambda _, *rest: common.convert_splits(paths, common.numbered_lines, make, *rest))


def _task_of_records(paths: dict[str, Path]) -> str:
    """Return the task that the first readable record names, or the one of its only annotation."""
    reason = f"{', '.join(map(str, paths.values()))}: there are no records"
    lines = ((path, *found[1:]) for path in paths.values() for found in common.numbered_lines(path))
    for path, number, line in lines:
        try:
            record = parse_json(line)
        except ValueError as error:
            record, reason = None, f"{path}, line {number}: not valid JSON ({error})"
        if not isinstance(record, dict):
            reason = reason if record is None else f"{path}, line {number}: not a JSON object"
            continue
        keys = [f'unknown key "{key}".{nearest(key, KEYS)}' for key in record if key not in KEYS]
        reason = f"{path}, line {number}: {keys[0].rstrip('.') if keys else 'the record does not determine the task'}"
        if is_task_name(record.get("task")):
            return str(record["task"])
        annotated = [name for name, subtasks in TASKS.items() if schema.ANNOTATIONS[subtasks[0]] in record]
        if len(annotated) == 1:
            return annotated[0]
        break
    raise UserError(
        f"{reason}, so the dataset's task is not known. Correct the record, or set the task in {DESCRIPTION} as "
        f'{{"task": "..."}}: {", ".join(TASKS)}, or a name of your own.'
    )


def _describe(draft: DatasetSpec, settings: dict[str, Any], where: Path, paths: dict[str, Path]) -> DatasetSpec:
    """Complete `draft` with sub-tasks, labels and reference F1, from the settings and else from the records."""
    possible = schema.subtasks_of(draft.task)
    for subtask in (key for name in list(_SETTINGS)[2:] for key in settings.get(name, ())):
        if subtask not in possible:
            raise UserError(f'{where}: "{subtask}" is no sub-task of {draft.task}.{nearest(str(subtask), possible)}')
    scratch = BuildReport(draft.name)
    labels = {**_collect_labels(draft, paths, scratch), **settings.get("labels", {})}
    known = [subtask for subtask in SUBTASKS if all(label_sets(subtask, labels[subtask]).values())]
    subtasks = tuple(settings.get("subtasks") or [subtask for subtask in possible if subtask in known])
    missing = [subtask for subtask in subtasks if subtask not in known]
    if missing or not subtasks:
        message = f"{where.parent}: no record has a label for {' and '.join(missing or possible)}."
        for first in scratch.rejected[:1]:
            message += f" First invalid record: {first.file}, line {first.line}: {first.reason}."
        raise UserError(f"{message} Fix the records, or set the labels in {DESCRIPTION}.")
    chosen = {subtask: labels[subtask] for subtask in subtasks}
    return replace(draft, subtasks=subtasks, labels=chosen, reference_f1=settings.get("reference_f1", {}))


def _collect_labels(draft: DatasetSpec, paths: dict[str, Path], scratch: BuildReport) -> dict[str, Any]:
    """Return the sorted labels of the valid records by sub-task; the other records are rejected in `scratch`."""
    found: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for path in paths.values():
        for _, number, line in common.numbered_lines(path):
            origin = {"file": path.name, "line": number}
            sample = scratch.attempt(partial(_sample, draft), line, origin)
            problems = schema.check_sample(sample) if sample is not None else []
            if problems:
                scratch.reject(origin, "; ".join(problems[:3]), "")
            elif sample is not None:
                for subtask, heading, label in schema.sample_labels(sample):
                    found[subtask, heading].add(label)
    names = {key: sorted(labels) for key, labels in found.items()}
    entities, types = names.get(("entity", "types"), []), names.get(("trigger", "types"), [])
    arguments = {"types": types, "roles": names.get(("argument", "roles"), [])}
    relations, links = (names.get((subtask, "relations"), []) for subtask in ("relation", "link"))
    return {"entity": entities, "relation": relations, "trigger": types, "argument": arguments, "link": links}


def _find(input_dir: Path) -> dict[str, Path]:
    """Return the file of each split that has one."""
    if not input_dir.is_dir():
        raise UserError(f"{input_dir}: no such directory. Set --input to the directory of train.jsonl.")
    split_of = {name: split for split, names in FILES.items() for name in names}
    known, paths = ", ".join(split_of), {}
    for path in sorted(input_dir.glob("*.jsonl")):
        split = split_of.get(path.name)
        if split is None or split in paths:
            raise UserError(f"{path}: not a file of another split. Names: {known}. Move other files elsewhere.")
        paths[split] = path
    if not paths:
        raise UserError(f"{input_dir}: contains none of {known}. shards/README.md shows the format.")
    return {split: paths[split] for split in FILES if split in paths}


def _read_settings(path: Path) -> dict[str, Any]:
    """Read and check the settings of dataset.json; none without the file."""
    if not path.is_file():
        return {}
    settings: dict[str, Any] = common.parse_json(common.read_bounded(path), str(path), dict)
    for key in settings:
        if key not in _SETTINGS:
            raise UserError(f'{path}: unknown setting "{key}".{nearest(key, _SETTINGS)}')
        try:
            TypeAdapter(_SETTINGS[key]).validate_python(settings[key])
        except ValidationError as error:
            raise validation_error(f'{path}: "{key}"', error, "shards/README.md shows the format.") from None
    if not is_task_name(settings.get("task", "mner")):
        raise UserError(f'{path}: "task" must be {", ".join(TASKS)}, or a plain name of your own.')
    if len(set(given := settings.get("subtasks", ()))) < len(given):
        raise UserError(f'{path}: "subtasks" has one twice. Name each once.')
    for subtask, names in settings.get("labels", {}).items():
        with located(path):
            groups = label_sets(subtask, names)
        for label in (label for group in groups.values() for label in group):
            if not schema.is_label(label):
                raise UserError(f'{path}: the label "{label}" of {subtask} has a comma, a marker or an extra space.')
    return settings


def _sample(spec: DatasetSpec, line: str, origin: Origin) -> Sample:
    """Build the sample of one line with the omitted fields; `build` validates it."""
    if len(line) > MAX_JSON_BYTES:
        raise ValueError(f"the line has {len(line)} characters")
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for key in record:
        if key not in KEYS:
            raise ValueError(f'unknown key "{key}".{nearest(key, KEYS)}')
    if record.get("task", spec.task) != spec.task:
        raise ValueError(f'its task is not the dataset\'s, which is "{spec.task}"')
    tokens, image, source = _tokens(record), record.get("image"), record.get("source", {})
    if not (image is None or isinstance(image, str)):
        raise ValueError("image: must be a file name or null")
    if not isinstance(source, dict):
        raise ValueError("source: must be an object")
    image = None if image is None else common.image_name(image)
    objects = [{"id": f"O{number}", "label": "", **item} for number, item in _items(record, "objects", 1)]
    annotations = _annotations(record, tokens)
    if "layout" in record:
        annotations["layout"] = record["layout"]
    return common.make_sample(spec, tokens, {**source, **origin}, image=image, objects=objects, **annotations)


def _tokens(record: dict[str, Any]) -> list[str]:
    text = record.get("text")
    if not (text is None or isinstance(text, str)):
        raise ValueError("text: must be a string")
    if "tokens" not in record:
        if text is None and record.get("image") is None:
            raise ValueError("there is neither a text nor tokens nor an image")
        return (text or "").split()
    tokens = common.token_list(record["tokens"])
    if text is not None and text != " ".join(tokens):
        raise ValueError("text: must be the tokens joined by single spaces; omit one of the two")
    return tokens


def _annotations(record: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "entities" in record:
        found["entities"] = [_mention(tokens, item, f"entities[{n}]") for n, item in _items(record, "entities")]
    if "relation" in record:
        if not isinstance(record["relation"], dict):
            raise ValueError("relation: must be an object")
        found["relation"] = _relation(tokens, record["relation"], "relation")
    if "links" in record:
        found["links"] = [_relation(tokens, item, f"links[{n}]") for n, item in _items(record, "links")]
    if "events" in record:
        found["events"] = [_event(tokens, event, f"events[{n}]") for n, event in _items(record, "events")]
    return found


def _relation(tokens: list[str], relation: dict[str, Any], where: str) -> dict[str, Any]:
    return {**relation, **{end: _mention(tokens, relation.get(end), f"{where}.{end}") for end in ("head", "tail")}}


def _event(tokens: list[str], event: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = [_mention(tokens, item, f"{where}.arguments[{n}]") for n, item in _items(event, "arguments")]
    trigger = {"trigger": _mention(tokens, event["trigger"], f"{where}.trigger")} if "trigger" in event else {}
    return {**event, **trigger, "arguments": arguments}


def _items(record: dict[str, Any], key: str, start: int = 0) -> list[tuple[int, dict[str, Any]]]:
    """Number the list of objects under `key`, which can be omitted."""
    value = record.get(key, [])
    if not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise ValueError(f"{key}: must be a list of objects")
    return list(enumerate(value, start))


def _mention(tokens: list[str], item: Any, where: str) -> Any:
    """Add the text or span that `item` omits. An item without both, or that is no mention, is returned unchanged."""
    if not isinstance(item, dict) or "object" in item or item.get("verbatim") is False:
        return item
    text, span = item.get("text"), item.get("span")
    if span is None and isinstance(text, str):
        spans = common.find_spans(tokens, text)
        if len(spans) != 1:
            raise ValueError(
                f'{where}: "{text[:60]}" occurs {len(spans)} times in the tokens, which spaces separate; give its span'
            )
        return {**item, **common.mention(tokens, *spans[0])}
    if text is None and isinstance(span, list) and len(span) == 2:
        return {**item, **common.mention(tokens, *span)}
    return item
