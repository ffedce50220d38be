"""The processor of any other image-text-to-text model of transformers: its own, told what a sample is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from ..errors import UserError
from ..tasks.schema import REGION
from .processor import MULTIPLE, Processor, one_line, pad

BOX_SCALE = 1000
"""Boxes are written as whole numbers of this many parts of the picture's side."""


class ImageTextProcessor(Processor):
    """The model's own processor and chat template; answers follow the conversation, and only they are labels.

    These models have no region tokens: a box stands in the prompt as numbers, ``O1 [0, 120, 450, 1000]``.

    Args:
        processor: a ``ProcessorMixin`` of transformers with a chat template

    Raises:
        UserError: it has no chat template, or its tokenizer no end-of-sequence token.
    """

    kind = "image_text"

    def __init__(self, processor: Any) -> None:
        super().__init__(processor.tokenizer)
        self.processor = processor
        if not processor.chat_template:
            raise UserError("The model's processor has no chat template, which tells where a picture stands in a text.")
        if self.tokenizer.eos_token is None:
            raise UserError("The tokenizer has no end-of-sequence token, so no answer would ever end.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def read(cls, path: str | Path, settings: dict[str, Any]) -> ImageTextProcessor:
        """From the files of :meth:`save_pretrained`."""
        return cls(AutoProcessor.from_pretrained(path, trust_remote_code=False))

    def save_pretrained(self, path: str | Path) -> None:
        super().save_pretrained(path)
        self.processor.save_pretrained(str(path))

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image | None] | None = None,
        boxes: Sequence[Sequence[Sequence[float]]] | None = None,
        answers: Sequence[str] | None = None,
        max_length: int = 256,
        max_answer_length: int = 128,
    ) -> dict[str, torch.Tensor]:
        """As in :class:`Processor`; what the model's own processor gives, and ``labels [B, S]`` of all tokens.

        A batch without any picture gets a small one whose tokens are masked: under ZeRO-3 every rank has to run the
        vision tower, and the rows' answers stay what they were.
        """
        images = images if images is not None else [None] * len(prompts)
        boxes = boxes if boxes is not None else [()] * len(prompts)
        texts = [
            self._conversation(with_boxes(self.cut(self.without_specials(prompt), max_length), row, image), image)
            for prompt, image, row in zip(prompts, images, boxes, strict=True)
        ]
        batch = self._encode(texts, images)
        if not any(image is not None for image in images):
            blank = Image.new("RGB", (64, 64))
            batch = _masked_first(self._encode([self._conversation("", blank)], [blank]), batch, self._filling)
        if answers is None:
            return batch
        end = int(self.tokenizer.eos_token_id)
        rows = [[*found[: max_answer_length - 1], end] for found in self.answer_ids(answers)]
        ids, mask = pad(rows, self._filling, left=False)
        labels = torch.full_like(batch["input_ids"], -100)
        batch = _side_by_side(batch, {"input_ids": ids, "attention_mask": mask})
        batch["labels"] = torch.cat([labels, ids.masked_fill(mask == 0, -100)], 1)
        return batch

    @property
    def _filling(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _conversation(self, prompt: str, image: Image.Image | None) -> str:
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": prompt}]
        turn = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def _encode(self, texts: list[str], images: Sequence[Image.Image | None]) -> dict[str, torch.Tensor]:
        pictures = [[image.convert("RGB")] if image is not None else [] for image in images]
        found = self.processor(
            text=texts,
            images=pictures if any(pictures) else None,
            padding=True,
            padding_side="left",
            pad_to_multiple_of=MULTIPLE,
            return_tensors="pt",
        )
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        found = self.tokenizer([self.without_specials(answer) for answer in answers], add_special_tokens=False)
        return list(found["input_ids"])

    def echoed(self, batch: dict[str, torch.Tensor]) -> int:
        return batch["input_ids"].shape[1]


def with_boxes(prompt: str, boxes: Sequence[Sequence[float]], image: Image.Image | None) -> str:
    """The prompt with each ``<region>`` written as its box in thousandths of the picture; empty where there is none."""
    parts = prompt.split(REGION)
    size = image.size if image is not None else None
    for number in range(1, len(parts)):
        box = boxes[number - 1] if number <= len(boxes) else None
        parts[number] = (_written(box, size) if box is not None and size is not None else "") + parts[number]
    return one_line("".join(parts))


def _written(box: Sequence[float], size: tuple[int, int]) -> str:
    shares = [round(BOX_SCALE * min(max(edge / size[side % 2], 0), 1)) for side, edge in enumerate(box)]
    return f"[{', '.join(map(str, shares))}]"


def _is_per_token(name: str) -> bool:
    return name in ("input_ids", "attention_mask") or name.endswith("token_type_ids")


def _side_by_side(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``left`` with ``right``'s columns after its own; what else of ``left`` has a number a token gets zeros there."""
    joined = dict(left)
    for name, value in left.items():
        if _is_per_token(name):
            more = right.get(name, torch.zeros_like(right["input_ids"]))
            joined[name] = torch.cat([value, more.to(value.dtype)], 1)
    return joined


def _masked_first(
    picture: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], filling: int
) -> dict[str, torch.Tensor]:
    """``batch`` with the one row of ``picture`` before its first row, masked, and ``picture``'s other tensors."""
    shape = (len(batch["input_ids"]), picture["input_ids"].shape[1])
    first = {}
    for name in filter(_is_per_token, picture):
        first[name] = picture[name].new_full(shape, filling if name == "input_ids" else 0)
        first[name][0] = picture[name][0]
    first["attention_mask"].zero_()
    return {**{name: value for name, value in picture.items() if name not in first}, **_side_by_side(first, batch)}
