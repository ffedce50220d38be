"""From prompts and pictures to a batch of tensors, and from token ids back to text: what all processors share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..files import write_text_atomic
from ..tasks.schema import REGION
from .pictures import PictureTransform, box_fractions

PREPROCESSOR = "vision_processor.json"
MULTIPLE = 8
"""Rows are padded to a multiple of this many tokens."""


class Processor:
    """Tokenizer and picture handling of one model; plain data, so that DataLoader workers can hold it.

    A kind of model has a subclass, which says how prompts, pictures and answers become tensors, and back.
    """

    kind: ClassVar[str]

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # A <region> of the user's was broken up where the prompt was made (tasks.schema.plain); what is left is ours.
        special = sorted(set(tokenizer.get_added_vocab()) - {REGION}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @staticmethod
    def from_pretrained(path: str | Path) -> Processor:
        """Read what :meth:`save_pretrained` wrote; the kind stands in its ``vision_processor.json``.

        Raises:
            OSError, ValueError, KeyError, TypeError: files are missing or not what they should be.
        """
        from .processor_causal import CausalProcessor
        from .processor_image_text import ImageTextProcessor
        from .processor_t5 import T5Processor

        settings = json.loads((Path(path) / PREPROCESSOR).read_text(encoding="utf-8"))
        kinds: dict[str, Any] = {one.kind: one for one in (T5Processor, CausalProcessor, ImageTextProcessor)}
        return kinds[settings.pop("kind", T5Processor.kind)].read(path, settings)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files and ``vision_processor.json``."""
        self.tokenizer.save_pretrained(str(path))
        write_text_atomic(Path(path) / PREPROCESSOR, json.dumps({"kind": self.kind, **self.settings()}))

    def settings(self) -> dict[str, Any]:
        """What ``read`` needs beside the tokenizer, as JSON has it."""
        return {}

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image | None] | None = None,
        boxes: Sequence[Sequence[Sequence[float]]] | None = None,
        answers: Sequence[str] | None = None,
        max_length: int = 256,
        max_answer_length: int = 128,
    ) -> dict[str, torch.Tensor]:
        """A batch for the model's forward.

        Args:
            prompts: B texts, with ``<region>`` where an object's token stands
            images: B pictures or None
            boxes: per row the objects' boxes in pixels of the row's picture, in the order of their ``<region>``
            answers: B target texts; without them no ``labels``, and the batch is for generation
            max_length, max_answer_length: truncation in text tokens; padding goes to a multiple of 8
        """
        raise NotImplementedError

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """The tokens of each answer, or of the beginning of one, as in ``labels``, without the end."""
        raise NotImplementedError

    def decode(self, token_ids: torch.Tensor) -> list[str]:
        """What the model generated, ``[B, T]``, as B texts with the task markers back in place, without padding."""
        return [one_line(text) for text in self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)]

    def echoed(self, batch: dict[str, torch.Tensor]) -> int:
        """How many of the generated tokens are the prompt over again."""
        return 0

    def without_specials(self, text: str) -> str:
        """Somebody's ``</s>`` or ``<image>`` is text like any other: it must not become the token of that name."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def cut(self, text: str, max_length: int) -> str:
        """The beginning of the text that is at most so many tokens long."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= max_length else text[: offsets[max_length - 1][1]]


class TowerProcessor(Processor):
    """For models with a tower of open_clip: pictures as its squares, boxes as fractions, text by :meth:`text`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pictures: PictureTransform) -> None:
        super().__init__(tokenizer)
        self.pictures = pictures

    def settings(self) -> dict[str, Any]:
        return self.pictures.to_dict()

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image | None] | None = None,
        boxes: Sequence[Sequence[Sequence[float]]] | None = None,
        answers: Sequence[str] | None = None,
        max_length: int = 256,
        max_answer_length: int = 128,
    ) -> dict[str, torch.Tensor]:
        """As in :class:`Processor`.

        Returns:
            what :meth:`text` gives, ``pixel_mask [B]``, 1 where a row has a picture, ``pixel_values [I, 3, H, W]``,
            those pictures in their order or a single blank one, and ``regions [B, R, 4]``, R >= 1.
        """
        images = images if images is not None else [None] * len(prompts)
        boxes = boxes if boxes is not None else [()] * len(prompts)
        shown = [image is not None for image in images]
        batch = self.text(prompts, shown, answers, max_length, max_answer_length)
        batch["pixel_values"] = self.pictures.pixel_values(images)
        batch["pixel_mask"] = torch.tensor(shown, dtype=torch.long)
        batch["regions"] = box_fractions(images, boxes)
        return batch

    def text(
        self,
        prompts: Sequence[str],
        shown: Sequence[bool],
        answers: Sequence[str] | None,
        max_length: int,
        max_answer_length: int,
    ) -> dict[str, torch.Tensor]:
        """``input_ids, attention_mask [B, S]`` and, with answers, ``labels [B, T]``, -100 where nothing is learnt."""
        raise NotImplementedError


def pad(rows: Sequence[Sequence[int]], filling: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask ``[B, S]`` of rows of any lengths, S a multiple of 8."""
    width = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
    fill = [width - len(row) for row in rows]
    ids = [[filling] * n + [*row] if left else [*row] + [filling] * n for row, n in zip(rows, fill, strict=True)]
    mask = [[0] * n + [1] * (width - n) if left else [1] * (width - n) + [0] * n for n in fill]
    return torch.tensor(ids), torch.tensor(mask)


def one_line(text: str) -> str:
    """The text with single spaces alone between words."""
    return re.sub(r"\s+", " ", text).strip()
