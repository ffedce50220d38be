"""Trained weights in use: text and picture in, typed records out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError

from lvlm_clorae.adapter_directory import SCHEMA
from lvlm_clorae.data.batches import decode_picture
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.models.constrained import Constraint, check_tokenizer
from lvlm_clorae.models.generation import choose_tasks, generate_answers
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.models.processor import Processor
from lvlm_clorae.records import Argument, Entity, Event, Record, Relation, Request
from lvlm_clorae.tasks import build_prompt, parse_answer

SCHEMA_VERSION = 1
_SCHEMA_KEYS = {"version", "base", "adapter", "tasks", "units", "max_length", "max_answer_length"}


class Extractor:
    """A base with a trained adapter. Make it by :meth:`from_pretrained`."""

    def __init__(self, model: Any, processor: Processor, schema: dict[str, Any], device: torch.device) -> None:
        self.model, self.processor, self.schema, self.device = model, processor, schema, device

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Extractor:
        """Load an adapter directory (a run's ``adapter`` or ``best``) on the base it was trained on.

        Args:
            device: by default a GPU where there is one
            dtype: of what is not quantised; by default the run's, in which its scores were measured

        Raises:
            UserError: the directory is none, or its base cannot be loaded.
        """
        path = Path(path)
        try:
            schema = json.loads((path / SCHEMA).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path}: holds no {SCHEMA}, so it is no adapter directory. Give a run's adapter/ or best/ folder."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path / SCHEMA}: cannot be read ({error}).") from None
        missing = sorted(_SCHEMA_KEYS - set(schema)) if isinstance(schema, dict) else sorted(_SCHEMA_KEYS)
        if missing:
            raise UserError(f"{path / SCHEMA}: has no {', '.join(missing)}. Export the adapter again.")
        if schema["version"] != SCHEMA_VERSION:
            raise UserError(
                f"{path / SCHEMA}: format version {schema['version']!r}, but this program reads {SCHEMA_VERSION}. "
                "Install the release that wrote it, or export the adapter again."
            )
        options = dict(schema.get("base_options", {}))
        dtype = dtype or getattr(torch, options.pop("dtype", "float32"))
        if schema["adapter"] == "full":
            model, processor = load_model(str(path), dtype=dtype)
        else:
            import peft

            base, _ = load_model(schema["base"], dtype=dtype, **options)
            try:
                model = peft.PeftModel.from_pretrained(base, str(path))
                processor = Processor.from_pretrained(path)
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(f"{path}: the adapter cannot be loaded on {schema['base']}: {reason}") from None
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        for weight in model.parameters():  # not buffers: rotary frequencies stay in fp32
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)
        return cls(model.to(target).eval(), processor, schema, target)

    def extract(
        self,
        text: str,
        image: str | Path | Image.Image | None = None,
        task: str = "mner",
        *,
        head: str | None = None,
        tail: str | None = None,
        boxes: Sequence[Sequence[float]] = (),
        constrained: bool = False,
    ) -> list[Record]:
        """The records of one text and picture; the arguments are those of :class:`Request`.

        Raises:
            UserError: as :meth:`extract_all`.
        """
        (records,) = self.extract_all([Request(text, image, task, head, tail, boxes)], constrained=constrained)
        return records

    def extract_all(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 16,
        constrained: bool = False,
        advance: Callable[[int], None] = lambda answers: None,
    ) -> list[list[Record]]:
        """The records of each request, in batches of similar length that may hold several tasks.

        Args:
            batch_size: questions answered at once; an event request is two questions, triggers and arguments
            constrained: whether answers are made of label names, words of the text, objects and separators alone
            advance: called with the number of questions answered

        Raises:
            UserError: a task the weights were not trained for, ``mre`` without head and tail, an unreadable picture, a
                tokenizer that is none for constrained decoding.
        """
        if constrained:
            check_tokenizer(self.processor)
        questions = [question for number, request in enumerate(requests) for question in self._ask(number, request)]
        questions.sort(key=lambda question: -len(question.prompt))
        found: dict[tuple[int, str], list[Any]] = {}
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            for question, answer in zip(batch, self._answers(batch, requests, constrained), strict=True):
                found[question.number, question.subtask] = parse_answer(answer, question.subtask, question.labels)
            advance(len(batch))
        return [_records(found, number, request) for number, request in enumerate(requests)]

    def _ask(self, number: int, request: Request) -> Iterator[_Question]:
        if request.task not in self.schema["tasks"]:
            raise UserError(f'The weights know no task "{request.task}".{nearest(request.task, self.schema["tasks"])}')
        sample = {
            "text": request.text,
            "objects": _objects(request),
            "relation": {"head": {"text": request.head}, "tail": {"text": request.tail}},
        }
        if request.boxes and request.image is None:
            raise UserError("Boxes are places in a picture: give the image too.")
        for subtask in dict.fromkeys(unit["subtask"] for unit in self._units(request.task)):
            if subtask == "relation" and not (request.head and request.tail):
                raise UserError("A relation is asked between two names: give head and tail (--head, --tail).")
            labels = self._labels(request.task, subtask)
            yield _Question(number, subtask, labels, sample, build_prompt(sample, subtask, labels))

    def _answers(self, batch: list[_Question], requests: Sequence[Request], constrained: bool) -> list[str]:
        asked = [requests[question.number] for question in batch]
        tensors = self.processor(
            [question.prompt for question in batch],
            [_open(request.image) for request in asked],
            [request.boxes for request in asked],
            max_length=self.schema["max_length"],
        )
        choose_tasks(self.model, [request.task for request in asked], self.schema["tasks"])
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        rows = [(question.sample, question.subtask, question.labels) for question in batch]
        constraint = Constraint(self.processor, rows) if constrained else None
        return generate_answers(self.model, self.processor, tensors, self.schema["max_answer_length"], constraint)

    def _units(self, task: str) -> list[dict[str, Any]]:
        return [unit for unit in self.schema["units"].values() if unit["task"] == task]

    def _labels(self, task: str, subtask: str) -> Any:
        """The labels of all trained datasets of the task for the sub-task together, in their order."""
        sets = [unit["labels"] for unit in self._units(task) if unit["subtask"] == subtask]
        if isinstance(sets[0], dict):
            return {key: list(dict.fromkeys(name for labels in sets for name in labels[key])) for key in sets[0]}
        return list(dict.fromkeys(name for labels in sets for name in labels))


def _open(image: str | Path | Image.Image | None) -> Image.Image | None:
    if image is None or isinstance(image, Image.Image):
        return image
    try:
        return decode_picture(Path(image).read_bytes(), str(image))
    except OSError as error:
        raise UserError(f"{image}: the picture cannot be read ({error.strerror}).") from None


class _Question(NamedTuple):
    """A sub-task of a request."""

    number: int
    subtask: str
    labels: Any
    sample: dict[str, Any]
    prompt: str


def _objects(request: Request) -> list[dict[str, Any]]:
    return [{"id": f"O{number}", "box": list(box)} for number, box in enumerate(request.boxes, start=1)]


def _records(found: dict[tuple[int, str], list[Any]], number: int, request: Request) -> list[Record]:
    entities, relations, triggers, arguments = (
        found.get((number, subtask), []) for subtask in ("entity", "relation", "trigger", "argument")
    )
    events = _events(triggers, arguments, _objects(request))
    return [*(Entity(*item) for item in entities), *(Relation(*item) for item in relations), *events]


def _events(triggers: list[Any], arguments: list[Any], objects: list[dict[str, Any]]) -> list[Event]:
    """Trigger and argument answers joined by event type; a type without trigger is an event of its own."""
    boxes = {item["id"]: tuple(item["box"]) for item in objects}
    by_type: dict[str, list[Argument]] = {}
    for kind, role, filler in arguments:
        argument = Argument(role, object=filler, box=boxes[filler]) if filler in boxes else Argument(role, text=filler)
        by_type.setdefault(kind, []).append(argument)
    events = [Event(kind, text or None, by_type.pop(kind, [])) for kind, text in triggers]
    return events + [Event(kind, None, found) for kind, found in by_type.items()]
