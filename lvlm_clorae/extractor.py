"""Trained weights in use: text and picture in, typed records out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from lvlm_clorae.data.batches import decode_picture
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.models.constrained import Constraint, check_tokenizer
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.models.processor import Processor
from lvlm_clorae.tasks import build_prompt, parse_answer

SCHEMA = "schema.json"
SCHEMA_VERSION = 1
_SCHEMA_KEYS = {"version", "base", "adapter", "tasks", "units", "max_length", "max_answer_length"}

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
    ) -> list[Entity | Relation | Event]:
        """The records of one text and picture.

        Args:
            text: the text, tokens separated by spaces as in the training data
            image: a picture or its file
            task: ``mner``, ``mre``, ``mee``, or one of the user's own that the weights were trained for
            head, tail: the two names whose relation is asked, for ``mre`` and whatever else asks for relations
            boxes: objects of the picture, x1, y1, x2, y2 in pixels, that may be arguments of events, for ``mee``
            constrained: whether answers are made of label names, words of the text, objects and separators alone

        Raises:
            UserError: a task the weights were not trained for, ``mre`` without head and tail, an unreadable picture, a
                tokenizer that is none for constrained decoding.
        """
        if task not in self.schema["tasks"]:
            raise UserError(f'The weights know no task "{task}".{nearest(task, self.schema["tasks"])}')
        subtasks = dict.fromkeys(unit["subtask"] for unit in self._units(task))
        if "relation" in subtasks and not (head and tail):
            raise UserError("A relation is asked between two names: give head and tail (--head, --tail).")
        if constrained:
            check_tokenizer(self.processor)
        picture = _open(image)
        if boxes and picture is None:
            raise UserError("Boxes are places in a picture: give the image too.")
        sample: dict[str, Any] = {
            "text": text,
            "objects": [{"id": f"O{number}", "box": list(box)} for number, box in enumerate(boxes, start=1)],
            "relation": {"head": {"text": head}, "tail": {"text": tail}},
        }
        found = {subtask: self._answer(sample, picture, task, subtask, constrained) for subtask in subtasks}
        records: list[Entity | Relation | Event] = [Entity(*item) for item in found.get("entity", ())]
        records += [Relation(*item) for item in found.get("relation", ())]
        return records + _events(found.get("trigger", []), found.get("argument", []), sample["objects"])

    def _answer(
        self, sample: dict[str, Any], picture: Image.Image | None, task: str, subtask: str, constrained: bool
    ) -> list[Any]:
        labels = self._labels(task, subtask)
        batch = self.processor(
            [build_prompt(sample, subtask, labels)],
            [picture],
            [[item["box"] for item in sample["objects"]]],
            max_length=self.schema["max_length"],
        )
        if hasattr(self.model, "set_task"):
            self.model.set_task(task)
        tensors = {name: tensor.to(self.device) for name, tensor in batch.items()}
        constraint = Constraint(self.processor, [(sample, subtask, labels)]) if constrained else None
        (answer,) = generate_answers(self.model, self.processor, tensors, self.schema["max_answer_length"], constraint)
        return parse_answer(answer, subtask, labels)

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


def _events(triggers: list[Any], arguments: list[Any], objects: list[dict[str, Any]]) -> list[Event]:
    """Trigger and argument answers joined by event type; a type without trigger is an event of its own."""
    boxes = {item["id"]: tuple(item["box"]) for item in objects}
    by_type: dict[str, list[Argument]] = {}
    for kind, role, filler in arguments:
        argument = Argument(role, object=filler, box=boxes[filler]) if filler in boxes else Argument(role, text=filler)
        by_type.setdefault(kind, []).append(argument)
    events = [Event(kind, text or None, by_type.pop(kind, [])) for kind, text in triggers]
    return events + [Event(kind, None, found) for kind, found in by_type.items()]
