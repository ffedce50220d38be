"""From prompts and pictures to a batch of tensors, and from token ids back to text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torchvision.transforms.functional import normalize
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..files import write_text_atomic
from ..tasks.schema import EVENT, REGION, SPOT

# T5's vocabulary has no "<", but it has sentinels that fine-tuning does not use otherwise.
MARKERS = {SPOT: "<extra_id_0>", EVENT: "<extra_id_1>", REGION: "<extra_id_99>"}
PREPROCESSOR = "vision_processor.json"


class Processor:
    """Tokenizer and picture transform of one model; plain data, so that DataLoader workers can hold it.

    A picture is squashed to the tower's square, never cropped: a box keeps its meaning as fractions of the picture.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        mean: Sequence[float] = open_clip.OPENAI_DATASET_MEAN,
        std: Sequence[float] = open_clip.OPENAI_DATASET_STD,
    ) -> None:
        self.tokenizer = tokenizer
        self.vision: dict[str, Any] = {"image_size": image_size, "mean": list(mean), "std": list(std)}
        self._special = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))
        # What open_clip's transform does after resizing, to one picture, is done to a whole batch at once.
        self._resize = open_clip.image_transform(image_size, is_train=False, resize_mode="squash").transforms[0]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Processor:
        """Read what :meth:`save_pretrained` wrote."""
        import lvlm_clorae.models.t5  # noqa: F401 - registers the configuration at which AutoTokenizer looks

        vision = json.loads((Path(path) / PREPROCESSOR).read_text(encoding="utf-8"))
        return cls(AutoTokenizer.from_pretrained(path), **vision)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files and ``vision_processor.json``."""
        self.tokenizer.save_pretrained(str(path))
        write_text_atomic(Path(path) / PREPROCESSOR, json.dumps(self.vision))

    @property
    def region_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(MARKERS[REGION]))

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
            answers: B target texts; without them no ``labels``
            max_length, max_answer_length: truncation in tokens; padding goes to the longest row, a multiple of 8

        Returns:
            ``input_ids, attention_mask [B, S]``, ``pixel_values [B, 3, H, W]``, ``pixel_mask [B]``,
            ``regions [B, R, 4]`` with R >= 1, and ``labels [B, T]`` with -100 at padding.
        """
        images = images if images is not None else [None] * len(prompts)
        boxes = boxes if boxes is not None else [()] * len(prompts)
        text = self._tokenize(prompts, max_length)
        batch = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
        batch["pixel_values"] = self._pixel_values(images)
        batch["pixel_mask"] = torch.tensor([image is not None for image in images], dtype=torch.long)
        batch["regions"] = self._regions(images, boxes)
        if answers is not None:
            target = self._tokenize(answers, max_answer_length)
            batch["labels"] = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        return batch

    def _pixel_values(self, images: Sequence[Image.Image | None]) -> torch.Tensor:
        """``[B, 3, H, W]``, zeros where there is no picture: what open_clip's transform makes of each alone."""
        rgb = [image if image.mode == "RGB" else image.convert("RGB") for image in images if image is not None]
        size = self.vision["image_size"]
        squares = np.array([np.asarray(self._resize(image)) for image in rgb], dtype=np.uint8)
        pixels = torch.from_numpy(squares.reshape(-1, size, size, 3)).permute(0, 3, 1, 2).contiguous().float().div_(255)
        normalize(pixels, self.vision["mean"], self.vision["std"], inplace=True)
        if len(rgb) == len(images):
            return pixels
        shown = torch.tensor([image is not None for image in images])
        return torch.zeros(len(images), 3, size, size).masked_scatter_(shown[:, None, None, None], pixels)

    def _tokenize(self, texts: Sequence[str], max_length: int) -> dict[str, torch.Tensor]:
        def with_sentinels(text: str) -> str:
            # Somebody's "</s>" or "<extra_id_99>" is text like any other: it must not become the token of that name.
            text = self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
            for marker, sentinel in MARKERS.items():
                text = text.replace(marker, sentinel)
            return text

        tokens = self.tokenizer(
            [with_sentinels(text) for text in texts],
            padding=True,
            pad_to_multiple_of=8,
            truncation=True,
            max_length=max_length,
        )
        # return_tensors="pt" would give the same by way of one flat list in Python: a twentieth of a sample's time
        return {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}

    @staticmethod
    def _regions(images: Sequence[Image.Image | None], boxes: Sequence[Sequence[Sequence[float]]]) -> torch.Tensor:
        regions = torch.zeros(len(boxes), max(1, *(len(row) for row in boxes)), 4)
        for row, (image, row_boxes) in enumerate(zip(images, boxes, strict=True)):
            if image is not None and row_boxes:
                width, height = image.size
                scale = torch.tensor([width, height, width, height], dtype=torch.float32)
                regions[row, : len(row_boxes)] = torch.tensor(row_boxes, dtype=torch.float32) / scale
        return regions.clamp(0, 1)

    def decode(self, token_ids: torch.Tensor) -> list[str]:
        """Token ids ``[B, T]`` -> B texts with the task markers back in place, padding and end removed."""
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=False)
        return [self._plain(text) for text in texts]

    def _plain(self, text: str) -> str:
        for token in (self.tokenizer.pad_token, self.tokenizer.eos_token):
            text = text.replace(str(token), " ")
        for marker, sentinel in MARKERS.items():
            text = text.replace(sentinel, f" {marker} ")
        return re.sub(r"\s+", " ", text).strip()
