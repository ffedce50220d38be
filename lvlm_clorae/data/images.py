"""Decode images from shards, which are not trusted: only JPEG, PNG and WebP, and none too large for memory."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from lvlm_clorae.data.reader import InvalidSample

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
"""Pillow reads more formats, some of them by running another program."""


class InvalidImage(InvalidSample):
    """The image of a sample cannot be decoded."""


def load_image(data: bytes) -> Image.Image:
    """Decode an image as stored. Raises ValueError if Pillow cannot, or it exceeds Pillow's decompression limit."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"is too large to decode safely ({error})") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        raise ValueError(f"cannot be decoded ({type(error).__name__}: {error})") from None


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode an image, upright (EXIF orientation) and in RGB. Raises InvalidImage, naming ``where``."""
    from PIL import ImageOps

    try:
        image = load_image(data)
        with suppress(Exception):  # Pillow cannot write the EXIF data of some valid images again
            ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise InvalidImage(f"{where}: its image {error}. Replace or remove it, and build the shard again.") from None
