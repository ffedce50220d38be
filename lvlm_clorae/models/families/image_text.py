"""The family of all other image-text-to-text models of transformers, used unchanged with their own processor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ...errors import UserError
from ...tasks.schema import REGION
from ..processor import (
    PADDING_MULTIPLE,
    Batch,
    Boxes,
    Images,
    Lengths,
    Processor,
    Texts,
    one_line,
    pad,
    reading,
    with_end_token,
)
from . import Family, LoadOptions, Source, greedy_generation

BOX_SCALE = 1000
"""Boxes are written as integers, in this fraction of the image's side."""


class ImageTextProcessor(Processor):
    """The model's own ``ProcessorMixin`` and chat template; answers follow the conversation, and only they are labels.

    These models have no region tokens: the prompt contains a box as numbers, ``O1 [0, 120, 450, 1000]``.
    """

    processor_type = "image_text"

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        if not processor.chat_template:
            raise UserError("The model's processor has no chat template, which places the image. Add one to the base.")
        super().__init__(with_end_token(processor.tokenizer))

    @classmethod
    def read(cls, path: str | Path, settings: dict[str, Any]) -> ImageTextProcessor:
        return cls(read_processor(str(path)))

    def settings(self) -> dict[str, Any]:
        return {"size": self.processor.image_processor.to_dict().get("size")}

    def save_pretrained(self, path: str | Path) -> None:
        super().save_pretrained(path)
        self.processor.save_pretrained(str(path))

    def encode(self, prompts: Texts, images: Images, boxes: Boxes, answers: Texts | None, lengths: Lengths) -> Batch:
        """Build a batch of the tensors of the model's own processor, and ``labels [B, S]`` for all tokens."""
        shortened = [self.truncate(self.without_specials(prompt), lengths[0]) for prompt in prompts]
        texts = [
            self._conversation(with_boxes(prompt, row, image), image)
            for prompt, image, row in zip(shortened, images, boxes, strict=True)
        ]
        batch = self._encode(texts, images)
        if not any(image is not None for image in images):
            # A small masked image, since under ZeRO-3 every rank has to run the vision tower.
            image = Image.new("RGB", (64, 64))
            blank = self._encode([self._conversation("", image)], [image])
            batch = _with_masked_image(blank, batch, self.pad_token_id)
        if answers is None:
            return batch
        rows = [self.with_end(found, lengths[1]) for found in self.answer_ids(answers)]
        ids, mask = pad(rows, self.pad_token_id, left=False)
        labels = torch.cat([torch.full_like(batch["input_ids"], -100), ids.masked_fill(mask == 0, -100)], 1)
        return {**_side_by_side(batch, {"input_ids": ids, "attention_mask": mask}), "labels": labels}

    def _conversation(self, prompt: str, image: Image.Image | None) -> str:
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": prompt}]
        turn = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def _encode(self, texts: list[str], images: Images) -> Batch:
        rgb = [[image.convert("RGB")] if image is not None else [] for image in images]
        how = {"padding": True, "padding_side": "left", "pad_to_multiple_of": PADDING_MULTIPLE, "return_tensors": "pt"}
        found = self.processor(text=texts, images=rgb if any(rgb) else None, **how)
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def prompt_length(self, batch: Mapping[str, torch.Tensor]) -> int:
        return batch["input_ids"].shape[1]


def with_boxes(prompt: str, boxes: Sequence[Sequence[float]], image: Image.Image | None) -> str:
    """Replace each ``<region>`` by its box in thousandths of the image, or by nothing where there is no box."""
    written = iter([_written(box, image.size) for box in boxes] if image is not None else [])
    return one_line(re.sub(re.escape(REGION), lambda _: next(written, ""), prompt))


def _written(box: Sequence[float], size: tuple[int, int]) -> str:
    return str([round(BOX_SCALE * min(max(edge / side, 0), 1)) for edge, side in zip(box, size * 2, strict=True)])


def _is_per_token(name: str) -> bool:
    return name in ("input_ids", "attention_mask") or name.endswith("token_type_ids")


def _side_by_side(left: Batch, right: Batch) -> Batch:
    """Append the columns of ``right`` to ``left``; per-token tensors that ``right`` lacks get zeros."""
    joined = dict(left)
    for name in filter(_is_per_token, left):
        more = right.get(name, torch.zeros_like(right["input_ids"]))
        joined[name] = torch.cat([left[name], more.to(left[name].dtype)], 1)
    return joined


def _with_masked_image(blank: Batch, batch: Batch, pad_token_id: int) -> Batch:
    """Prepend the one row of ``blank``, masked, to the first row of ``batch``, and add ``blank``'s other tensors."""
    shape = (len(batch["input_ids"]), blank["input_ids"].shape[1])
    first = {}
    for name in filter(_is_per_token, blank):
        first[name] = blank[name].new_full(shape, pad_token_id if name == "input_ids" else 0)
        first[name][0] = blank[name][0]
    first["attention_mask"].zero_()
    return {**{name: value for name, value in blank.items() if name not in first}, **_side_by_side(first, batch)}


def read_processor(path: str) -> Any:
    """Load the processor of a directory or hub id. Raises ValueError if one of its files is invalid."""
    with reading("file of the processor or tokenizer"):
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)


class ImageTextFamily(Family):
    """Image-text-to-text models of transformers."""

    name = "image_text"
    description = "the other image-text-to-text models of transformers"
    processor_class = ImageTextProcessor

    def matches(self, config: Any) -> bool:
        return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    def describe(self, source: Source, options: LoadOptions) -> Any:
        return AutoModelForImageTextToText.from_config(source.config, dtype=torch.float32)

    def load(self, source: Source, options: LoadOptions) -> tuple[Any, ImageTextProcessor]:
        processor = ImageTextProcessor(read_processor(source.base))
        model = AutoModelForImageTextToText.from_pretrained(
            source.base, trust_remote_code=False, **options.from_pretrained
        )
        model.generation_config = greedy_generation(model, processor)
        return model, processor


FAMILY = ImageTextFamily()
