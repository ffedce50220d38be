"""Load images: from bytes, a file, a URL, a Pillow image or an array to an upright 8-bit RGB image and its size.

Bytes are not trusted: only JPEG, PNG and WebP are decoded (Pillow reads some other formats by running a program), and
none that is too large for memory. Boxes are in the frame of the upright image (EXIF orientation applied) everywhere.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from lvlm_clorae.data.reader import MAX_IMAGE_BYTES, InvalidSample
from lvlm_clorae.errors import UserError
from lvlm_clorae.images import TURNED, decoded, orientation_of, to_rgb, turn_upright, undecodable

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import PIL.Image

    ImageSource = bytes | bytearray | memoryview | str | os.PathLike[str] | PIL.Image.Image | np.ndarray

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_KEPT_PIXELS = 1 << 24
"""Larger images are reduced to at most this many pixels, so that a batch of them fits into memory."""
URL_SECONDS = 60


class InvalidImage(InvalidSample):
    """An image cannot be read or decoded."""


class LoadedImage(NamedTuple):
    """An upright 8-bit RGB image. ``size`` is its width and height before it was reduced: the frame of its boxes."""

    image: PIL.Image.Image
    size: tuple[int, int]

    def scaled(self, boxes: Iterable[Iterable[float]]) -> list[list[float]]:
        """Return boxes in the frame ``size`` as boxes in pixels of ``image``."""
        if self.image.size == self.size:
            return [list(box) for box in boxes]
        factors = [now / before for now, before in zip(self.image.size, self.size, strict=True)] * 2
        return [[edge * factor for edge, factor in zip(box, factors, strict=True)] for box in boxes]


def load_image(source: ImageSource, where: str, max_pixels: int = MAX_KEPT_PIXELS) -> LoadedImage:
    """Load an image upright and in 8-bit RGB.

    Transparent images are composited over white, 16-bit values are scaled to 8 bits, and of an animation the first
    frame is taken.

    Args:
        source: the bytes of a JPEG, PNG or WebP file; its path; an ``http(s)://`` URL; a ``data:`` URI; a Pillow image;
            or an array of 8 or 16 unsigned bits, ``[H, W]``, ``[H, W, 3]`` (RGB) or ``[H, W, 4]`` (RGBA)
        where: subject of the error message, such as ``a.tar, 17: its image``
        max_pixels: larger images are reduced, keeping their aspect ratio

    Raises:
        InvalidImage: the source cannot be read, decoded or converted, or exceeds Pillow's limit of pixels.
    """
    try:
        image = _open(source)
        orientation = orientation_of(image)
        width, height = image.size
        if not width * height:
            raise ValueError(f"is an empty image of {width}x{height} pixels")
        scale = math.sqrt(max_pixels / (width * height))
        if scale < 1 and image is source:
            image = decoded(image).copy()  # what follows is in place
        elif scale < 1:
            image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))  # JPEG decodes at 1/2, 1/4 or 1/8
        image = turn_upright(to_rgb(decoded(image)), orientation)
    except ValueError as error:
        raise InvalidImage(f"{where} {error}.") from None
    size = (height, width) if orientation in TURNED else (width, height)
    if scale < 1:
        image.thumbnail((max(1, int(size[0] * scale)), max(1, int(size[1] * scale))))
    return LoadedImage(image, size)


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height of the upright image, from its header. Raises ValueError if it is no image."""
    image = _open(data)
    return image.size[::-1] if orientation_of(image) in TURNED else image.size


def _open(source: Any) -> PIL.Image.Image:
    """Open an image, of a file only its header. Raises ValueError, whose message follows a subject."""
    import numpy as np
    import PIL.Image

    if isinstance(source, PIL.Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    data = bytes(source) if isinstance(source, bytes | bytearray | memoryview) else _read(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            return PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"is too large to decode safely ({error})") from None
    except PIL.UnidentifiedImageError:
        raise ValueError("cannot be decoded: it is not a JPEG, PNG or WebP image") from None
    except Exception as error:
        raise undecodable(error) from None


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    import numpy as np
    import PIL.Image

    channels = array.shape[2:] if array.ndim == 3 else ()
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or channels not in ((), (3,), (4,)):
        raise ValueError(
            f"is a {array.dtype} array of shape {array.shape}; give uint8 or uint16 of [H, W], [H, W, 3] or [H, W, 4]"
        )
    if not array.size:
        raise ValueError(f"is an empty array of shape {array.shape}")
    return PIL.Image.fromarray((array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array)


def _read(source: Any) -> bytes:
    """Read the bytes of a path, URL or data URI, at most ``MAX_IMAGE_BYTES``. Raises ValueError."""
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"is a {type(source).__name__}; give bytes, a path, a URL, a Pillow image or a NumPy array")
    name = os.fspath(source)
    if isinstance(source, str) and name.startswith("data:"):
        return _data_uri(name)
    if isinstance(source, str) and name.startswith(("http://", "https://")):
        return _download(name)
    try:
        if not os.path.isfile(name):
            raise ValueError("is not a file" if os.path.exists(name) else "does not exist")
        with open(name, "rb") as handle:
            return _bounded(handle.read(MAX_IMAGE_BYTES + 1))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"has more than the {MAX_IMAGE_BYTES} bytes allowed")
    return data


def _data_uri(uri: str) -> bytes:
    head, comma, content = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("is a data URI without base64 content; write data:image/png;base64,...")
    try:
        return _bounded(base64.b64decode(content, validate=True))
    except binascii.Error as error:
        raise ValueError(f"is a data URI that is not valid base64 ({error})") from None


def _download(url: str) -> bytes:
    from lvlm_clorae.data.storage import read_url

    try:
        return read_url(url, MAX_IMAGE_BYTES, URL_SECONDS)
    except UserError as error:
        raise ValueError(f"cannot be downloaded: {str(error).rstrip('.')}") from None
