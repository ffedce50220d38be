"""Pictures from shards, which may be anything: only JPEG, PNG and WebP are decoded, and none too large for memory."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from lvlm_clorae.data.reader import BadSample

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
"""Pillow reads many more, some of them by running another program."""


def load_picture(data: bytes) -> Image.Image:
    """The decoded picture, as stored.

    Raises ValueError where Pillow cannot decode it, and above its MAX_IMAGE_PIXELS, the limit for decompression bombs.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            picture.load()
            return picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"is too large to decode safely ({error})") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        raise ValueError(f"cannot be decoded ({type(error).__name__}: {error})") from None


def decode_picture(data: bytes, where: str) -> Image.Image:
    """The picture upright (EXIF orientation) and in RGB. Raises BadSample, naming ``where``, where it is not sound."""
    from PIL import ImageOps

    try:
        picture = load_picture(data)
        with suppress(Exception):  # EXIF data that Pillow cannot write again, in a picture that is sound
            ImageOps.exif_transpose(picture, in_place=True)
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except ValueError as error:
        raise BadSample(f"{where}: its picture {error}. Replace or remove it, then build again.") from None
