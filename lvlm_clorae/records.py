"""What is asked of an extractor and what it answers: plain data, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_clorae.errors import UserError, nearest

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[float, float, float, float]


class _Record:
    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, with its kind."""
        return {"record": type(self).__name__.lower(), **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Entity(_Record):
    """A named entity of the text."""

    type: str
    text: str


@dataclass(frozen=True)
class Relation(_Record):
    """How ``head`` stands to ``tail``."""

    head: str
    label: str
    tail: str


@dataclass(frozen=True)
class Argument:
    """Who or what plays ``role``: words of the text, or an object of the picture with its box in pixels."""

    role: str
    text: str | None = None
    object: str | None = None
    box: Box | None = None


@dataclass(frozen=True)
class Event(_Record):
    """An event; ``trigger`` is None where only the picture shows it."""

    type: str
    trigger: str | None
    arguments: list[Argument] = field(default_factory=list)


Record = Entity | Relation | Event


@dataclass(frozen=True)
class Request:
    """One text and picture, and what is asked of them.

    Args:
        text: the text, tokens separated by spaces as in the training data
        image: a picture or its file
        task: ``mner``, ``mre``, ``mee``, or one of the user's own that the weights were trained for
        head, tail: the two names whose relation is asked, for ``mre`` and whatever else asks for relations
        boxes: objects of the picture, x1, y1, x2, y2 in pixels, that may be arguments of events, for ``mee``
    """

    text: str = ""
    image: str | Path | Image.Image | None = None
    task: str = "mner"
    head: str | None = None
    tail: str | None = None
    boxes: Sequence[Sequence[float]] = ()


_KEYS = ("text", "image", "task", "head", "tail", "objects")


def read_requests(path: Path, task: str) -> Iterator[tuple[dict[str, Any], Request]]:
    """Each line of a JSON lines file as it is and as a request; a picture's path is relative to the file.

    Args:
        task: of lines that name none

    Raises:
        UserError: naming the line: no JSON object, nothing to read, a value of another type, a picture that is missing.
    """
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _request(line, f"{path}, line {number}", path.parent, task)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def _request(line: str, where: str, folder: Path, task: str) -> tuple[dict[str, Any], Request]:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(given, dict):
        raise UserError(f"{where}: must be an object with any of {', '.join(_KEYS)}.")
    for key in ("text", "image", "task", "head", "tail"):
        if not isinstance(given.get(key), str | None):
            raise UserError(f"{where}: {key} must be a text.")
    if not (given.get("text") or given.get("image")):
        misspelt = next((nearest(key, _KEYS) for key in given if key not in _KEYS), "")
        raise UserError(f'{where}: there is nothing to read, give "text", "image" or both.{misspelt}')
    image = folder / given["image"] if given.get("image") else None
    if image and not image.is_file():
        raise UserError(f"{where}: no such picture: {image}.")
    boxes = check_boxes(given.get("objects") or [], f"{where}: objects")
    names = given.get("head"), given.get("tail")
    return given, Request(given.get("text") or "", image, given.get("task") or task, *names, boxes)


def check_boxes(boxes: object, where: str) -> list[list[float]]:
    """``[[x1, y1, x2, y2], ...]`` in pixels. Raises UserError, beginning with ``where``, for anything else."""
    wrong = UserError(f"{where}: {str(boxes)[:80]} is no list of boxes. Write pixels as [[x1, y1, x2, y2], ...].")
    try:
        found = [[float(value) for value in box] for box in boxes]  # type: ignore[attr-defined]
    except (ValueError, TypeError):
        raise wrong from None
    for box in found:
        if not (len(box) == 4 and 0 <= box[0] < box[2] < float("inf") and 0 <= box[1] < box[3] < float("inf")):
            raise wrong
    return found
