"""Processors: prompts and images to a batch of tensors, token ids back to text, and the type of every token."""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError, first_line
from ..files import parse_json, write_text_atomic
from ..images import upright_rgb
from ..tasks.schema import REGION, box_problem

logger = logging.getLogger(__name__)

PREPROCESSOR = "vision_processor.json"
PADDING_MULTIPLE = 8
TOKEN_TYPES = ("text", "visual", "answer")
"""A token's type is its index here. Image and region tokens are ``visual``; other special tokens are ``text``."""
TEXT, VISUAL, ANSWER = range(len(TOKEN_TYPES))
PADDING = -1

Texts = Sequence[str]
Images = Sequence[Image.Image | None]
Boxes = Sequence[Sequence[Sequence[float]]]
Lengths = tuple[int, int]
"""Maximum length of a prompt and of an answer, in text tokens."""
Batch = dict[str, Tensor]


class Processor:
    """Tokenizer and image handling of a model: plain data, so that DataLoader workers can hold it.

    Each model family has a subclass, which implements :meth:`read` and :meth:`encode`.
    """

    processor_type: ClassVar[str]
    """Name of the subclass in ``vision_processor.json``."""
    reads_images: bool = True
    """False for a text-only base, whose prompts contain boxes as numbers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pad_token_id: int = tokenizer.pad_token_id
        self.eos_token_id: int = tokenizer.eos_token_id
        # build_prompt already breaks up a user's <region> (tasks.schema.plain); the remaining ones are placeholders.
        special = sorted(set(tokenizer.get_added_vocab()) - {REGION}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @staticmethod
    def from_pretrained(path: str | Path) -> Processor:
        """Read the files of :meth:`save_pretrained`, as the subclass named in ``vision_processor.json``."""
        from .families import families

        with reading(PREPROCESSOR):
            settings = {**parse_json((Path(path) / PREPROCESSOR).read_bytes())}
        found = settings.pop("kind", "t5")
        for family in families():
            if family.processor_class.processor_type == found:
                return family.processor_class.read(path, settings)
        raise ValueError(
            f"{Path(path) / PREPROCESSOR}: unknown processor {reprlib.repr(found)}. Register its model family first."
        )

    @classmethod
    def read(cls, path: str | Path, settings: dict[str, Any]) -> Processor:
        """Read the tokenizer in ``path``; ``settings`` is the result of :meth:`settings` at saving."""
        raise NotImplementedError

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files and ``vision_processor.json``."""
        self.tokenizer.save_pretrained(str(path))
        write_text_atomic(Path(path) / PREPROCESSOR, self.description())

    def settings(self) -> dict[str, Any]:
        """Return the JSON settings that :meth:`read` needs beside the tokenizer."""
        return {}

    def description(self) -> str:
        """Return the content of ``vision_processor.json``, which is the same for the processors of one base."""
        return json.dumps({"kind": self.processor_type, **self.settings()})

    def __call__(
        self,
        prompts: Texts,
        images: Images | None = None,
        boxes: Boxes | None = None,
        answers: Texts | None = None,
        max_source_length: int = 512,
        max_target_length: int = 128,
    ) -> Batch:
        """Build a batch for the model's forward, or for ``generate`` where there are no answers.

        A prompt or answer that is cut is a warning: ``tasks.fit_prompt`` cuts the text and keeps the labels.

        Args:
            prompts: B texts, with ``<region>`` at the position of each object's token
            images: B images or None, of any mode and orientation
            boxes: the boxes of each row's objects in pixels of its upright image, in the order of their ``<region>``
            answers: B target texts; without them the batch has no ``labels``
            max_source_length, max_target_length: truncation in text tokens, before padding to a multiple of 8; an
                answer that is cut has no end-of-sequence token

        Raises:
            TypeError, ValueError: an argument is of another type or has another length than ``prompts``, an image
                cannot be converted, or the boxes of a row are invalid or not as many as its ``<region>``.
        """
        check_list("prompts", prompts, "str", str)
        if not prompts:
            raise ValueError("prompts is empty. Give at least one.")
        images = images if images is not None else [None] * len(prompts)
        boxes = boxes if boxes is not None else [()] * len(prompts)
        check_list("images", images, "PIL.Image.Image or None", Image.Image | None, len(prompts))
        check_list("boxes", boxes, "list of boxes [x1, y1, x2, y2]", (list, tuple), len(prompts))
        if any(not isinstance(box, list | tuple) or len(box) != 4 for row in boxes for box in row):
            raise TypeError("boxes must hold a list of [x1, y1, x2, y2] per row.")
        check_list("answers", prompts if answers is None else answers, "str", str, len(prompts))
        images = [image and _upright(image, number) for number, image in enumerate(images)]
        for row, given in enumerate(zip(prompts, images, boxes, strict=True)):
            _check_boxes(row, *given)
        self._warn_of_cuts("prompts", max_source_length, map(self.prompt_tokens, prompts))
        self._warn_of_cuts("answers", max_target_length - 1, map(len, self.answer_ids(answers or [""])))
        return self.encode(prompts, images, boxes, answers, (max_source_length, max_target_length))

    def _warn_of_cuts(self, what: str, limit: int, lengths: Iterable[int]) -> None:
        if cut := sum(length > limit for length in lengths):
            logger.warning("%d %s have more than %d tokens and are cut", cut, what, limit)

    def encode(self, prompts: Texts, images: Images, boxes: Boxes, answers: Texts | None, lengths: Lengths) -> Batch:
        """Build a batch; see :meth:`__call__`."""
        raise NotImplementedError

    def shared_prefix(self, batch: Batch) -> int:
        """Return how many first tokens of the prompts ``generate`` may compute once for all rows of a batch."""
        return 0

    def answer_ids(self, answers: Texts) -> list[list[int]]:
        """Tokenize answers, or beginnings of answers, as in ``labels`` but without the end-of-sequence token."""
        found = self.tokenizer([self.without_specials(answer) for answer in answers], add_special_tokens=False)
        return list(found["input_ids"])

    def prompt_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt, as ``max_source_length`` counts them."""
        return len(self.tokenizer(self.without_specials(prompt), add_special_tokens=False)["input_ids"])

    def with_end(self, answer_ids: Sequence[int], max_length: int) -> list[int]:
        """Append the end-of-sequence token, or cut to ``max_length`` without it: the model would learn to stop."""
        whole = len(answer_ids) < max_length
        return [*answer_ids, self.eos_token_id] if whole else list(answer_ids[:max_length])

    def decode(self, token_ids: Tensor) -> list[str]:
        """Decode generated tokens ``[B, T]`` to B texts with the task markers restored and padding removed."""
        return [one_line(text) for text in self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)]

    def prompt_length(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of prompt tokens that precede the new ones in the output of ``generate``."""
        return 0

    def without_specials(self, text: str) -> str:
        """Break up special tokens in a user's text, so that ``</s>`` or ``<image>`` is tokenized like other text."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def truncate(self, text: str, max_length: int) -> str:
        """Return the beginning of a text, at most ``max_length`` tokens long."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= max_length else text[: offsets[max_length - 1][1]]


def _upright(image: Image.Image, number: int) -> Image.Image:
    try:
        return upright_rgb(image)
    except ValueError as error:
        raise ValueError(f"images[{number}] {error}.") from None


def _check_boxes(row: int, prompt: str, image: Image.Image | None, boxes: Sequence[Sequence[float]]) -> None:
    for box in boxes:
        if problem := box_problem(box, image.size if image else None):
            raise ValueError(f"boxes[{row}]: the box {problem}.")
    if image and prompt.count(REGION) != len(boxes):
        raise ValueError(f"boxes[{row}] has {len(boxes)} boxes for {prompt.count(REGION)} {REGION} in the prompt.")


def check_list(name: str, values: Any, wanted: str, types: Any, length: int | None = None) -> None:
    """Raise TypeError or ValueError unless an argument is a list or tuple, of these types and of this length."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a list of {wanted}, not {type(values).__name__}.")
    for number, value in enumerate(values):
        if not isinstance(value, types):
            raise TypeError(f"{name}[{number}] must be {wanted}, not {type(value).__name__}.")
    if length not in (None, len(values)):
        raise ValueError(f"{name} has {len(values)} entries, but there are {length} prompts. Give one per prompt.")


class TowerProcessor(Processor):
    """Base of processors for models with an open_clip tower; subclasses implement :meth:`encode_text`.

    Without an ``image_transform`` the model is text only: images and boxes raise ValueError.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_transform: ImageTransform | None) -> None:
        super().__init__(tokenizer)
        self.image_transform = image_transform
        self.reads_images = image_transform is not None

    @classmethod
    def read(cls, path: str | Path, settings: dict[str, Any]) -> TowerProcessor:
        tokenizer = read_tokenizer(str(path))
        transform = {field.name: settings.pop(field.name) for field in fields(ImageTransform) if field.name in settings}
        with reading(PREPROCESSOR):
            return cls(tokenizer, ImageTransform(**transform) if transform else None, **settings)

    def settings(self) -> dict[str, Any]:
        return asdict(self.image_transform) if self.image_transform else {}

    def encode(self, prompts: Texts, images: Images, boxes: Boxes, answers: Texts | None, lengths: Lengths) -> Batch:
        """Build a batch of :meth:`encode_text` with the image inputs of the model.

        ``pixel_values [I, 3, H, W]`` are the images in row order or a single blank one; ``pixel_mask [B]`` is 1 where
        a row has an image; ``regions [B, R, 4]``, R >= 1, are boxes in 0..1, in the order of the region tokens. A
        text-only model has no image inputs.
        """
        has_image = [image is not None for image in images]
        if self.image_transform is None and (any(has_image) or any(boxes)):
            raise ValueError("This processor is text only (vision none). Leave images and boxes out.")
        batch = self.encode_text(prompts, has_image, answers, lengths)
        if self.image_transform is None:
            return batch
        batch["pixel_values"] = self.image_transform.pixel_values(images)
        batch["pixel_mask"] = torch.tensor(has_image, dtype=torch.long)
        batch["regions"] = box_fractions(images, boxes)
        return batch

    def encode_text(self, prompts: Texts, has_image: Sequence[bool], answers: Texts | None, lengths: Lengths) -> Batch:
        """Return ``input_ids, attention_mask [B, S]`` and, with answers, ``labels [B, T]`` with -100 at padding."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImageTransform:
    """Image preprocessing of a vision tower; plain data, written to ``vision_processor.json``.

    Images are squashed to the tower's square, never cropped, so that a box keeps its meaning as fractions of the image.
    """

    image_size: int
    mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD
    interpolation: str = "bicubic"

    @cached_property
    def _resize(self) -> Any:
        # open_clip's remaining transforms work on one image; pixel_values applies them to the whole batch.
        how = {"is_train": False, "resize_mode": "squash", "interpolation": self.interpolation}
        return open_clip.image_transform(self.image_size, **how).transforms[0]

    def pixel_values(self, images: Images) -> Tensor:
        """Transform the images that are present to ``[I, 3, image_size, image_size]``, or one blank image for none."""
        rgb = [image if image.mode == "RGB" else image.convert("RGB") for image in images if image is not None]
        if not rgb:
            return torch.zeros(1, 3, self.image_size, self.image_size)
        squares = np.array([np.asarray(self._resize(image)) for image in rgb], dtype=np.uint8)
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return normalize(pixels, list(self.mean), list(self.std), inplace=True)


@contextmanager
def reading(files: str) -> Iterator[None]:
    """Raise ValueError with the names of the ``files`` for invalid content, which libraries report in many ways."""
    try:
        yield
    except (UserError, OSError, ImportError):
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"invalid {files}: {first_line(error)}") from None


def read_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory or hub id. Raises OSError if it has none, ValueError if a file is invalid."""
    with reading("tokenizer.json or tokenizer_config.json"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
        return tokenizer


def box_fractions(images: Images, boxes: Boxes) -> Tensor:
    """Convert boxes in pixels to fractions ``[B, R, 4]``, R >= 1, of their row's image; zeros where there is none."""
    regions = torch.zeros(len(boxes), max(1, *(len(row) for row in boxes)), 4)
    for row, (image, row_boxes) in enumerate(zip(images, boxes, strict=True)):
        if image is not None and row_boxes:
            scale = torch.tensor(image.size * 2, dtype=torch.float32)
            regions[row, : len(row_boxes)] = torch.tensor(row_boxes, dtype=torch.float32) / scale
    return regions.clamp(0, 1)


def pad(rows: Sequence[Sequence[int]], pad_token_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """Pad token ids to ids and mask ``[B, S]``, S a multiple of 8."""
    width = -(-max(map(len, rows)) // PADDING_MULTIPLE) * PADDING_MULTIPLE
    ids, mask = torch.full((len(rows), width), pad_token_id), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        columns = slice(width - len(row), None) if left else slice(len(row))
        ids[number, columns], mask[number, columns] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def with_end_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a padding token. Raises UserError if it has no end-of-sequence token."""
    if tokenizer.eos_token is None:
        raise UserError("The tokenizer has no end-of-sequence token, so answers would not end. Set its eos_token.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def one_line(text: str) -> str:
    """Replace every run of white space by one space and strip the ends."""
    return re.sub(r"\s+", " ", text).strip()


def input_token_types(config: Any, batch: Mapping[str, Tensor], length: int) -> Tensor:
    """Return the token types ``[B, length]`` of the encoder's input, or of a decoder-only model's whole row.

    Surplus of ``length`` over ``input_ids`` are visual tokens before the text (T5 ``concat``).
    """
    ids = batch["input_ids"]
    types = torch.full_like(ids, TEXT)
    for name in ("image_token_id", "region_token_id"):
        placeholder = getattr(config, name, None)
        if placeholder is not None:
            types = types.masked_fill(ids == placeholder, VISUAL)
    if not getattr(config, "is_encoder_decoder", False):
        answers = answer_token_types(batch)
        before = ids.shape[1] - answers.shape[1]
        types = torch.cat([types[:, :before], torch.where(answers == ANSWER, ANSWER, types[:, before:])], 1)
    types = types.masked_fill(batch["attention_mask"] == 0, PADDING)
    if length == ids.shape[1]:
        return types
    images = torch.where(batch["pixel_mask"] == 1, VISUAL, PADDING)
    return torch.cat([images.unsqueeze(1).expand(-1, length - ids.shape[1]), types], 1)


def answer_token_types(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the token types ``[B, T]`` of the decoder's input, which is the answer shifted right by one token."""
    return torch.where(batch["labels"] != -100, ANSWER, PADDING)
