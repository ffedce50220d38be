"""The extractor: typed records from text and image by a trained adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image

from lvlm_clorae.data.images import load_image
from lvlm_clorae.errors import UserError, first_line, located
from lvlm_clorae.inference.adapter_directory import check_files, read_schema
from lvlm_clorae.inference.records import (
    Argument,
    Entity,
    Event,
    Records,
    Relation,
    Request,
    check_boxes,
    check_request,
)
from lvlm_clorae.models.constrained import Constraint, check_tokenizer
from lvlm_clorae.models.generation import choose_tasks, generate_answers
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.models.processor import Processor, check_list
from lvlm_clorae.quiet import quiet_libraries
from lvlm_clorae.tasks import SUBTASKS, fit_prompt, parse_answer

if TYPE_CHECKING:
    from lvlm_clorae.data.images import ImageSource

logger = logging.getLogger(__name__)


class Extractor:
    """A base with a trained adapter, loaded by :meth:`from_pretrained`."""

    def __init__(self, model: Any, processor: Processor, schema: dict[str, Any], device: torch.device) -> None:
        self.model, self.processor, self.schema, self.device = model, processor, schema, device
        self._said = False  # that images are not read

    @classmethod
    @quiet_libraries()
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Extractor:
        """Load an adapter directory (a run's ``adapter`` or ``best``) and the base it was trained on.

        Args:
            device: default a GPU if there is one
            dtype: of weights that are not quantized; default that of the run

        Raises:
            UserError: ``path`` is no adapter directory, its adapter method is not registered, or the base cannot be
                loaded.
        """
        path = Path(path)
        schema = read_schema(path)
        check_files(path)
        options = dict(schema.get("base_options", {}))
        trained = options.pop("dtype", "float32")
        dtype = dtype or getattr(torch, trained)
        model, processor = _load(path, schema, dtype, options)
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        for weight in model.parameters():  # buffers, such as rotary frequencies, stay in fp32
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)
        return cls(model.to(target).eval(), processor, schema, target)

    def extract(
        self,
        text: str,
        image: ImageSource | None = None,
        task: str = "mner",
        *,
        head: str | None = None,
        tail: str | None = None,
        boxes: Sequence[Sequence[float]] = (),
        layout: Sequence[Mapping[str, Any]] = (),
        constrained: bool = False,
    ) -> Records:
        """Extract the records of one text and image; see :class:`Request` and :meth:`extract_all`."""
        (records,) = self.extract_all([Request(text, image, task, head, tail, boxes, layout)], constrained=constrained)
        return records

    def extract_all(
        self, requests: Sequence[Request], *, batch_size: int = 16, constrained: bool = False
    ) -> list[Records]:
        """Extract the records of each request, in batches of similar length that may mix tasks.

        A text that is too long for the adapter is read up to there, with a warning; see ``text_read`` of the result.

        Args:
            batch_size: questions per batch; an event request is two questions, triggers and arguments
            constrained: restrict answers to label names, words of the text, objects and separators

        Raises:
            TypeError: a request, or a field of one, is of another type.
            UserError: a task the adapter was not trained for, ``mre`` without head and tail, an unreadable image,
                invalid text or boxes, a batch size below 1, or a tokenizer that does not allow constrained decoding.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size must be at least 1: {batch_size}.")
        check_list("requests", requests, "Request", Request)
        if constrained:
            check_tokenizer(self.processor)
        if not (self.processor.reads_images or self._said) and any(request.image is not None for request in requests):
            self._said = True
            with_image = sum(request.image is not None for request in requests)
            logger.warning("text only: the images of %d of %d requests are not read", with_image, len(requests))
        requests = [replace(request, boxes=check_boxes(request.boxes, "boxes")) for request in requests]
        questions = [question for pair in enumerate(requests) for question in self._questions(*pair)]
        questions.sort(key=lambda question: -len(question.prompt))
        found: dict[tuple[int, str], list[Any]] = {}
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            for question, answer in zip(batch, self._answers(batch, requests, constrained), strict=True):
                found[question.number, question.subtask] = parse_answer(answer, question.subtask, question.labels)
        results = [_records(found, number, request) for number, request in enumerate(requests)]
        for question in questions:
            if question.read < len(words := requests[question.number].text.split()):
                results[question.number].text_read = " ".join(words[: question.read])
                shares = question.number + 1, question.read, len(words)
                logger.warning("request %d: only %d of %d words fit into the prompt", *shares)
        return results

    def _questions(self, number: int, request: Request) -> Iterator[_Question]:
        check_request(request, self.schema)
        relation = {"head": {"text": request.head}, "tail": {"text": request.tail}}
        tokens = request.text.split()
        sample = {"text": request.text, "tokens": tokens, "objects": _objects(request), "relation": relation}
        sample["layout"] = request.layout
        for subtask, labels in self._labels(request.task).items():
            fitted = fit_prompt(sample, subtask, labels, self._fits, self.processor.reads_images)
            yield _Question(number, subtask, labels, sample, *fitted)

    def _fits(self, prompt: str) -> bool:
        return self.processor.prompt_tokens(prompt) <= int(self.schema["max_source_length"])

    def _answers(self, batch: list[_Question], requests: Sequence[Request], constrained: bool) -> list[str]:
        rows = [requests[question.number] for question in batch]
        loaded = []
        for question, request in zip(batch, rows, strict=True):
            with located(f"request {question.number + 1}") if len(requests) > 1 else nullcontext():
                loaded.append(_image_of(request) if self.processor.reads_images else (None, []))
        prompts = [question.prompt for question in batch]
        images, boxes = [image for image, _ in loaded], [boxes for _, boxes in loaded]
        lengths = self.schema["max_source_length"], self.schema["max_target_length"]
        tensors = self.processor.encode(prompts, images, boxes, None, lengths)  # the prompts fit
        same_model = choose_tasks(self.model, [request.task for request in rows], self.schema["tasks"])
        samples = [(question.sample, question.subtask, question.labels) for question in batch]
        constraint = Constraint(self.processor, samples) if constrained else None
        length = self.schema["max_target_length"]
        return generate_answers(self.model, self.processor, tensors, length, self.device, constraint, same_model)

    def _labels(self, task: str) -> dict[str, Any]:
        """Return for each sub-task of the task the union of the labels of its datasets, in their order."""
        sets: dict[str, list[Any]] = {}
        for dataset_task in self.schema["dataset_tasks"].values():
            if dataset_task["task"] == task:
                sets.setdefault(dataset_task["subtask"], []).append(dataset_task["labels"])
        return {subtask: _union(found) for subtask, found in sets.items()}


def _union(sets: list[Any]) -> Any:
    if isinstance(sets[0], dict):
        return {key: _union([labels[key] for labels in sets]) for key in sets[0]}
    return list(dict.fromkeys(name for labels in sets for name in labels))


def _load(path: Path, schema: dict[str, Any], dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Processor]:
    """Load the model and processor of an adapter directory. Raises UserError if they cannot be loaded."""
    import peft  # its imports print

    from lvlm_clorae.inference.adapter_files import check_stored_size, read_adapter
    from lvlm_clorae.models.fingerprint import check_base

    try:
        if schema["adapter"] == "full":
            check_stored_size(path)
            return load_model(str(path), dtype=dtype)
        config, weights = read_adapter(path, schema)
        base, of_base = load_model(schema["base"], dtype=dtype, **options)
        check_base(base, schema["base_fingerprint"], f"{path}: on {schema['base']}")
        processor = Processor.from_pretrained(path)
        if processor.description() != of_base.description():
            raise ValueError("its image or text preprocessing is not that of the base")
        model = peft.get_peft_model(base, config)
        peft.set_peft_model_state_dict(model, weights)
        return model, processor
    except UserError:
        raise
    except Exception as error:  # invalid files make PEFT, transformers, tokenizers and safetensors raise anything
        raise UserError(f"{path}: the adapter cannot be loaded on {schema['base']}: {first_line(error)}") from None


def _image_of(request: Request) -> tuple[Image.Image | None, list[list[float]]]:
    """Load the image of a request, with its boxes in pixels of the loaded image. Raises UserError."""
    if request.image is None:
        return None, []
    named = isinstance(request.image, str | Path)
    loaded = load_image(request.image, f"{str(request.image)[:200]}: the image" if named else "The image")
    return loaded.image, loaded.scaled(check_boxes(request.boxes, "boxes", loaded.size))


class _Question(NamedTuple):
    """One sub-task of a request."""

    number: int
    subtask: str
    labels: Any
    sample: dict[str, Any]
    prompt: str
    read: int


def _objects(request: Request) -> list[dict[str, Any]]:
    return [{"id": f"O{number}", "box": list(box)} for number, box in enumerate(request.boxes, start=1)]


def _records(found: dict[tuple[int, str], list[Any]], number: int, request: Request) -> Records:
    entities, relations, triggers, arguments, links = (found.get((number, subtask), []) for subtask in SUBTASKS)
    events = _events(triggers, arguments, _objects(request))
    return Records([*(Entity(*item) for item in entities), *(Relation(*item) for item in relations + links), *events])


def _events(triggers: list[Any], arguments: list[Any], objects: list[dict[str, Any]]) -> list[Event]:
    """Join trigger and argument answers by event type; a type without trigger is a separate event."""
    boxes = {item["id"]: tuple(item["box"]) for item in objects}
    by_type: dict[str, list[Argument]] = {}
    for event_type, role, filler in arguments:
        argument = Argument(role, object=filler, box=boxes[filler]) if filler in boxes else Argument(role, text=filler)
        by_type.setdefault(event_type, []).append(argument)
    events = [Event(event_type, text or None, by_type.pop(event_type, [])) for event_type, text in triggers]
    return events + [Event(event_type, None, found) for event_type, found in by_type.items()]
