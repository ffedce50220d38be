"""Images are decoded upright and in RGB; an image that cannot be decoded makes its sample invalid."""

from __future__ import annotations

import io
import random
from contextlib import suppress

import pytest
from PIL import Image

from lvlm_clorae.data.images import decode_image
from lvlm_clorae.data.reader import InvalidSample
from tests.helpers.shards import pil_image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_of_every_format_are_rgb(kind: str) -> None:
    assert decode_image(pil_image(kind), "here").mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "kind"),
    [*((mode, "PNG") for mode in ("L", "LA", "RGBA", "P", "1", "I;16")), ("CMYK", "JPEG"), ("RGBA", "WEBP")],
)
def test_images_of_every_mode_are_converted_to_rgb(mode: str, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (6, 4)).save(buffer, kind)
    decoded = decode_image(buffer.getvalue(), "here")
    assert (decoded.mode, decoded.size) == ("RGB", (6, 4))


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "BMP", "EPS"])
def test_other_formats_are_not_decoded(kind: str) -> None:
    """Pillow would read them, EPS by running Ghostscript on untrusted bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, kind)
    with pytest.raises(InvalidSample, match=r"^here: its image"):
        decode_image(buffer.getvalue(), "here")


def test_images_are_rotated_by_their_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # rotated camera: the first stored row is the right side
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue(), "here").size == (10, 20)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_data_does_not_invalidate_the_image() -> None:
    """Pillow raises struct.error or TypeError when it rotates such an image and writes its data again."""
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a caption"
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8)).save(buffer, "JPEG", exif=exif)
    caption = buffer.getvalue().index(b"\x01\x0e\x00\x02")
    for tag in (0x00, 0x1A):
        data = bytearray(buffer.getvalue())
        data[caption + 1] = tag
        assert decode_image(bytes(data), "here").mode == "RGB"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_are_invalid_samples() -> None:
    rng = random.Random(0)
    decoded = 0
    for kind in ("PNG", "JPEG", "WEBP"):
        for _ in range(200):
            data = bytearray(pil_image(kind, (12, 8)))
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(min(len(data), rng.choice([60, 200, 10_000])))] = rng.randrange(256)
            with suppress(InvalidSample):
                decode_image(bytes(data[: rng.randrange(1, 2 * len(data))]), "here")
                decoded += 1
    assert 0 < decoded < 400


@pytest.mark.parametrize("limit", [40, 60])
def test_images_too_large_to_decode_are_invalid(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The image has 96 pixels, and Pillow only warns up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InvalidSample, match=r"^here: its image.*bomb"):
        decode_image(pil_image("PNG", (12, 8)), "here")
