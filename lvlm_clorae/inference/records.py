"""Requests to an extractor and the records it returns: plain data. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_clorae.arguments import suggestion
from lvlm_clorae.errors import UserError, located, nearest
from lvlm_clorae.files import parse_json
from lvlm_clorae.tasks.schema import box_problem, check_sample, is_encodable, plain

if TYPE_CHECKING:
    from lvlm_clorae.data.images import ImageSource

Box = tuple[float, float, float, float]


class _Record:
    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data, with its type."""
        return {"record": type(self).__name__.lower(), **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Entity(_Record):
    """A named entity in the text."""

    type: str
    text: str


@dataclass(frozen=True)
class Relation(_Record):
    """The relation of ``head`` to ``tail``."""

    head: str
    label: str
    tail: str


@dataclass(frozen=True)
class Argument:
    """The filler of ``role``: words of the text, or an object in the image with its box in pixels."""

    role: str
    text: str | None = None
    object: str | None = None
    box: Box | None = None


@dataclass(frozen=True)
class Event(_Record):
    """An event; ``trigger`` is None if only the image shows it."""

    type: str
    trigger: str | None
    arguments: list[Argument] = field(default_factory=list)


Record = Entity | Relation | Event


class Records(list[Record]):
    """The records of a request, and the beginning of its text that was read if that is not the whole text."""

    text_read: str | None = None


@dataclass(frozen=True)
class Request:
    """One text and image with a task.

    Args:
        text: tokens separated by spaces, as in the training data
        image: any source of ``lvlm_clorae.data.images.load_image``: a file, its bytes, a URL, a Pillow image, an array
        task: ``mner``, ``mre``, ``mee`` or a custom task that the adapter was trained for
        head, tail: the two names whose relation is extracted, for tasks with relations
        boxes: objects in the image as x1, y1, x2, y2 in pixels, possible arguments of events
        layout: boxes of the text, as in the training data: ``{"span": [start, end], "box": [x1, y1, x2, y2]}``
    """

    text: str = ""
    image: ImageSource | None = None
    task: str = "mner"
    head: str | None = None
    tail: str | None = None
    boxes: Sequence[Sequence[float]] = ()
    layout: Sequence[Mapping[str, Any]] = ()


_STRINGS = ("text", "image", "task", "head", "tail")
_KEYS = (*_STRINGS, "boxes", "layout")


def read_requests(path: Path, task: str, schema: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Request]]:
    """Read a JSON lines file; yield each line's object and its request, by default for ``task``, to an adapter.

    Image paths are relative to the file; an image may also be a URL or a ``data:`` URI. An invalid line raises
    UserError with its number.
    """
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    with located(f"{path}, line {number}"):
                        given, request = _request(line, path.parent, task)
                        check_request(request, schema)
                    yield given, request
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def _request(line: str, folder: Path, task: str) -> tuple[dict[str, Any], Request]:
    try:
        given = parse_json(line)
    except ValueError as error:
        raise UserError(f"not valid JSON ({error}).") from None
    if not isinstance(given, dict):
        raise UserError(f"must be an object with any of {', '.join(_KEYS)}.")
    for key in _STRINGS:
        if not isinstance(given.get(key), str | None):
            raise UserError(f"{key} must be a string.")
    if not (given.get("text") or given.get("image") is not None):
        misspelt = next((nearest(key, _KEYS) for key in given if key not in _KEYS), "")
        raise UserError(f'has no text and no image. Give "text", "image" or both.{misspelt}')
    image = find_image(given.get("image"), folder)
    for key in given:
        similar = difflib.get_close_matches(key, _KEYS, 1, 0.76)  # other keys are copied to the answer
        if key == "objects" or (similar and key not in _KEYS):
            raise UserError(f'there is no key "{key}".{suggestion(key, _KEYS)}')
    boxes = check_boxes(given.get("boxes") or [], "boxes")
    text, asked = given.get("text") or "", given.get("task") or task
    return given, Request(text, image, asked, given.get("head"), given.get("tail"), boxes, given.get("layout") or ())


def find_image(image: str | None, folder: Path = Path()) -> Path | str | None:
    """Return a URL or ``data:`` URI as it is, and a path relative to a folder. Raises UserError if it is no file."""
    if image is None or image.startswith(("http://", "https://", "data:")):
        return image
    if not image:
        raise UserError("The name of the image is empty. Leave it out for a request without an image.")
    try:
        found = (folder / image).is_file()
    except OSError:  # the name is too long
        found = False
    if not found:
        raise UserError(f"{str(folder / image)[:200]}: the image does not exist.")
    return folder / image


def check_request(request: Request, schema: Mapping[str, Any]) -> None:
    """Raise UserError if the adapter with this schema cannot answer the request, TypeError for another type."""
    task, tasks = request.task, schema["tasks"]
    texts = {"text": request.text, "task": task, "head": request.head or "", "tail": request.tail or ""}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a str, not {type(value).__name__}.")
    if task not in tasks:
        raise UserError(f'The adapter was not trained for task "{task}".{nearest(task, tasks)}')
    if not all(map(is_encodable, texts.values())):
        raise UserError("The text has unpaired surrogates, which cannot be encoded as UTF-8. Remove them.")
    if request.layout:
        sample = {"text": request.text, "tokens": request.text.split(), "task": task, "layout": request.layout}
        if problems := [problem for problem in check_sample(sample) if problem.startswith("layout")]:
            raise UserError(f"{problems[0]}. Give the boxes of the text in its order.")
    if request.boxes and request.image is None:
        raise UserError("Boxes need an image. Give the image too.")
    subtasks = {found["subtask"] for found in schema["dataset_tasks"].values() if found["task"] == task}
    if "relation" in subtasks and not (request.head and request.tail):
        raise UserError("A relation needs two names. Give head and tail (--head, --tail).")
    for name in ("head", "tail"):
        if texts[name] and "relation" not in subtasks:
            raise UserError(f"The task {task} has no relation between two names. Leave {name} out.")
        if texts[name] and f" {plain(texts[name])} " not in f" {plain(request.text)} ":
            raise UserError(f'{name} "{texts[name][:60]}" is not in the text. Give it as the text\'s tokens.')


def check_boxes(boxes: object, where: str, size: tuple[int, int] | None = None) -> list[list[float]]:
    """Convert boxes ``[[x1, y1, x2, y2], ...]``, also of NumPy, to floats.

    Args:
        size: width and height of the upright image; None if it is not known yet

    Raises:
        UserError: the boxes are invalid (:func:`~lvlm_clorae.tasks.schema.box_problem`); prefixed by ``where``.
    """
    try:
        found = [[float(value) for value in box] for box in boxes]  # type: ignore[attr-defined]
    except (ValueError, TypeError, OverflowError):
        raise UserError(
            f"{where}: {str(boxes)[:80]} is not a list of boxes. Write pixels as [[x1, y1, x2, y2], ...]."
        ) from None
    for box in found:
        if problem := box_problem(box, size):
            raise UserError(f"{where}: the box {problem}. Write pixels as [[x1, y1, x2, y2], ...].")
    return found
