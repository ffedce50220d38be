"""Pictures and boxes as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torchvision.transforms.functional import normalize


@dataclass(frozen=True)
class PictureTransform:
    """What a vision tower wants of a picture; plain data, written to ``vision_processor.json``.

    A picture is squashed to the tower's square, never cropped: a box keeps its meaning as fractions of the picture.
    """

    image_size: int
    mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD
    interpolation: str = "bicubic"

    @cached_property
    def _resize(self) -> Any:
        # What open_clip's transform does after resizing, to one picture, is done to a whole batch at once.
        return open_clip.image_transform(
            self.image_size, is_train=False, resize_mode="squash", interpolation=self.interpolation
        ).transforms[0]

    def to_dict(self) -> dict[str, Any]:
        """Its fields as JSON has them."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def pixel_values(self, images: Sequence[Image.Image | None]) -> torch.Tensor:
        """The pictures that there are, ``[I, 3, image_size, image_size]``; a blank one where there is none at all."""
        rgb = [image if image.mode == "RGB" else image.convert("RGB") for image in images if image is not None]
        size = self.image_size
        squares = np.array([np.asarray(self._resize(image)) for image in rgb], dtype=np.uint8)
        pixels = torch.from_numpy(squares.reshape(-1, size, size, 3)).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return (
            normalize(pixels, list(self.mean), list(self.std), inplace=True) if rgb else torch.zeros(1, 3, size, size)
        )


def box_fractions(images: Sequence[Image.Image | None], boxes: Sequence[Sequence[Sequence[float]]]) -> torch.Tensor:
    """Boxes in pixels of their row's picture as fractions of it: ``[B, R, 4]`` with R >= 1, zeros where there is none.

    What reaches out of the picture is cut off.
    """
    regions = torch.zeros(len(boxes), max(1, *(len(row) for row in boxes)), 4)
    for row, (image, row_boxes) in enumerate(zip(images, boxes, strict=True)):
        if image is not None and row_boxes:
            width, height = image.size
            scale = torch.tensor([width, height, width, height], dtype=torch.float32)
            regions[row, : len(row_boxes)] = torch.tensor(row_boxes, dtype=torch.float32) / scale
    return regions.clamp(0, 1)
