"""Pictures become upright RGB, and what is no sound picture is a bad sample."""

from __future__ import annotations

import io
import random
from contextlib import suppress

import pytest
from PIL import Image

from lvlm_clorae.data.pictures import decode_picture
from lvlm_clorae.data.reader import BadSample
from tests.data.helpers import picture


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_rgb_whatever_they_were(kind: str) -> None:
    assert decode_picture(picture(kind), "here").mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "kind"),
    [*((mode, "PNG") for mode in ("L", "LA", "RGBA", "P", "1", "I;16")), ("CMYK", "JPEG"), ("RGBA", "WEBP")],
)
def test_pictures_of_every_mode_become_rgb(mode: str, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (6, 4)).save(buffer, kind)
    decoded = decode_picture(buffer.getvalue(), "here")
    assert (decoded.mode, decoded.size) == ("RGB", (6, 4))


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "BMP", "EPS"])
def test_other_formats_are_not_even_tried(kind: str) -> None:
    """Pillow would read them: EPS by running Ghostscript on what somebody put into a shard."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, kind)
    with pytest.raises(BadSample, match="here: its picture cannot be decoded"):
        decode_picture(buffer.getvalue(), "here")


def test_pictures_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned: the first row stored is the right side
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=exif)
    assert decode_picture(buffer.getvalue(), "here").size == (10, 20)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_data_does_not_cost_the_picture() -> None:
    """Pillow raises struct.error or TypeError where it turns such a picture and writes its data again."""
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a caption"
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8)).save(buffer, "JPEG", exif=exif)
    caption = buffer.getvalue().index(b"\x01\x0e\x00\x02")
    for tag in (0x00, 0x1A):
        data = bytearray(buffer.getvalue())
        data[caption + 1] = tag
        assert decode_picture(bytes(data), "here").mode == "RGB"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures_are_bad_samples() -> None:
    rng = random.Random(0)
    sound = 0
    for kind in ("PNG", "JPEG", "WEBP"):
        for _ in range(200):
            data = bytearray(picture(kind, (12, 8)))
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(min(len(data), rng.choice([60, 200, 10_000])))] = rng.randrange(256)
            with suppress(BadSample):
                decode_picture(bytes(data[: rng.randrange(1, 2 * len(data))]), "here")
                sound += 1
    assert 0 < sound < 400


@pytest.mark.parametrize("limit", [40, 60])
def test_pictures_too_large_to_decode_are_refused(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Of 96 pixels: Pillow only warns up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadSample, match="here: its picture is too large to decode safely"):
        decode_picture(picture("PNG", (12, 8)), "here")
