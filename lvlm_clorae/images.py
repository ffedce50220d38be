"""Convert Pillow images to upright 8-bit RGB: EXIF orientation applied, transparency over white, 16 bits scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import PIL.Image

_ORIENTATION = 0x112
TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image, upright and in 8-bit RGB. Raises ValueError, whose message follows a subject."""
    return turn_upright(to_rgb(decoded(image)), orientation_of(image))


def undecodable(error: Exception) -> ValueError:
    """Return the error for an image whose bytes are damaged."""
    # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and others.
    return ValueError(f"cannot be decoded ({type(error).__name__}: {error})")


def orientation_of(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or it cannot be read."""
    try:
        found = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data is no reason to reject an image
        return 1
    return found if 1 <= found <= 8 else 1


def decoded(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image with its pixels read. Raises ValueError."""
    try:
        image.load()
    except Exception as error:
        raise undecodable(error) from None
    return image


def turn_upright(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    """Return the image turned by its EXIF orientation, which the result no longer has."""
    from PIL.Image import Transpose

    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    if orientation not in turn:
        return image
    turned = image.transpose(turn[orientation])
    turned.info = {}  # else the orientation would be applied again
    return turned


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert to RGB, transparency over white. Raises ValueError for floating-point and 32-bit images."""
    import PIL.Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = PIL.Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def _to_grey(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale 16-bit values to 8 bits; Pillow's own conversion clips them at 255."""
    import numpy as np
    import PIL.Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"has values of mode {image.mode}, not 8 or 16 bits; convert it to RGB first")
    return PIL.Image.fromarray((values >> 8).astype(np.uint8))
