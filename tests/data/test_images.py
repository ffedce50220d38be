"""Images of every source and mode become upright 8-bit RGB; what cannot be decoded is an InvalidImage."""

from __future__ import annotations

import base64
import io
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvlm_clorae.data.images import MAX_KEPT_PIXELS, InvalidImage, load_image
from lvlm_clorae.data.reader import MAX_IMAGE_BYTES
from tests.helpers.server import serve
from tests.helpers.shards import pil_image

GREEN_CORNER = Image.new("RGB", (100, 50), "red")
GREEN_CORNER.paste("green", (0, 0, 50, 25))  # the upper left quarter
ORIENTED = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
"""EXIF orientation -> the quarter (right, lower) of the upright image in which the stored upper left one is."""


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def oriented(orientation: int, kind: str = "JPEG", image: Image.Image = GREEN_CORNER) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return encoded(image, kind, exif=exif)


def pixels(source: Any) -> np.ndarray:
    loaded = load_image(source, "here")
    assert loaded.image.mode == "RGB"
    assert loaded.image.size == loaded.size
    return np.asarray(loaded.image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_of_every_format_are_rgb(kind: str) -> None:
    assert pixels(pil_image(kind)).shape[2] == 3


@pytest.mark.parametrize(
    ("mode", "kind"),
    [*((mode, "PNG") for mode in ("L", "LA", "RGBA", "P", "1", "I;16")), ("CMYK", "JPEG"), ("RGBA", "WEBP")],
)
def test_images_of_every_mode_are_converted_to_rgb(mode: str, kind: str) -> None:
    assert pixels(encoded(Image.new(mode, (6, 4)), kind)).shape == (4, 6, 3)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "BMP", "EPS"])
def test_other_formats_are_not_decoded(kind: str) -> None:
    """Pillow would read them, EPS by running Ghostscript on untrusted bytes."""
    with pytest.raises(InvalidImage, match=r"^here .*not a JPEG, PNG or WebP image"):
        load_image(encoded(Image.new("RGB", (6, 4)), kind), "here")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_images_are_upright(kind: str, orientation: int) -> None:
    data = oriented(orientation, kind)
    found = pixels(data)
    height, width, _ = found.shape
    assert (width, height) == ((100, 50) if orientation < 5 else (50, 100))
    right, lower = ORIENTED[orientation]
    quarter = found[lower * height // 2 :, right * width // 2 :][: height // 2, : width // 2]
    assert quarter[:, :, 1].mean() > 100 > 10 > found[:, :, 1].mean() - quarter[:, :, 1].mean() / 4
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data))), found)  # a Pillow image as its file


def test_a_file_without_valid_orientation_is_as_stored() -> None:
    for orientation in (0, 9, 777):
        assert load_image(oriented(orientation), "here").size == (100, 50)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_data_neither_invalidates_nor_turns_an_image_by_chance() -> None:
    """Pillow raises struct.error or TypeError when it writes such data again, as ``ImageOps.exif_transpose`` does."""
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a caption"
    buffer = encoded(Image.new("RGB", (12, 8)), "JPEG", exif=exif)
    caption = buffer.index(b"\x01\x0e\x00\x02")
    for tag in (0x00, 0x1A):
        data = bytearray(buffer)
        data[caption + 1] = tag
        assert load_image(bytes(data), "here").size == (8, 12)


@pytest.mark.parametrize(
    "image",
    [
        encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))),
        encoded(Image.new("LA", (4, 4), (0, 0))),
        encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "WEBP", lossless=True, exact=True),
        encoded(Image.new("RGB", (4, 4)), transparency=(0, 0, 0)),
        encoded(Image.new("L", (4, 4)), transparency=0),
        encoded(Image.new("P", (4, 4)), transparency=0),
        Image.new("RGBA", (4, 4), (0, 0, 0, 0)),
        np.zeros((4, 4, 4), np.uint8),
    ],
)
def test_transparency_is_white(image: Any) -> None:
    assert (pixels(image) == 255).all()


def test_alpha_is_composited() -> None:
    half = pixels(Image.new("RGBA", (2, 2), (200, 0, 0, 128)))
    np.testing.assert_allclose(half[0, 0], [255 + (200 - 255) * 128 / 255, 127, 127], atol=1)


def test_sixteen_bits_are_scaled() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for source in (ramp, Image.fromarray(ramp), encoded(Image.fromarray(ramp)), Image.fromarray(ramp.astype(np.int32))):
        np.testing.assert_array_equal(pixels(source)[:, :, 0], ramp >> 8)
    colour = np.stack([ramp] * 3, 2)
    np.testing.assert_array_equal(pixels(colour), colour >> 8)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    red, blue = (Image.new("RGB", (6, 6), name) for name in ("red", "blue"))
    for kind in ("PNG", "WEBP"):
        data = encoded(red, kind, save_all=True, append_images=[blue], lossless=True)
        assert (pixels(data) == [255, 0, 0]).all()


def test_sources_of_the_same_bytes_are_equal(tmp_path: Path) -> None:
    data = pil_image("PNG")
    path = tmp_path / "image.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    array = np.asarray(Image.open(path))
    for source in (data, bytearray(data), memoryview(data), path, str(path), uri, Image.open(path), array):
        np.testing.assert_array_equal(pixels(source), pixels(data))
    with serve(tmp_path) as server:
        np.testing.assert_array_equal(pixels(f"{server.url}/image.png?size=large/1"), pixels(data))
        with pytest.raises(InvalidImage, match=r"404|FileNotFound"):
            load_image(f"{server.url}/other.png", "here")
        path.write_bytes(bytes(MAX_IMAGE_BYTES + 1))
        with pytest.raises(InvalidImage, match="bytes allowed"):
            load_image(f"{server.url}/image.png", "here")


@pytest.mark.parametrize(
    "source",
    [
        None,
        3,
        b"",
        b"<html>",
        "no such file.png",
        "data:image/png,xx",
        "data:image/png;base64,!",
        "http://127.0.0.1:9/x.png",
        Path("/dev/zero"),
        Path("/"),
        np.zeros((3, 3)),
        np.zeros((0, 3), np.uint8),
        np.zeros((3, 3, 2), np.uint8),
        Image.new("F", (3, 3)),
        Image.fromarray(np.full((3, 3), 1 << 20, np.int32)),
    ],
)
def test_other_sources_are_invalid(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm_clorae.data.images.URL_SECONDS", 1)
    with pytest.raises(InvalidImage, match=r"^here "):
        load_image(source, "here")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with open(path, "wb") as handle:
        os.truncate(handle.fileno(), 12 << 30)
    with pytest.raises(InvalidImage, match="bytes allowed"):
        load_image(path, "here")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_images_are_reduced_and_keep_the_frame_of_their_boxes(kind: str) -> None:
    image = Image.new("RGB", (400, 200), "red")
    image.paste("green", (300, 100, 400, 200))
    loaded = load_image(oriented(6, kind, image), "here", max_pixels=5000)  # stored; upright 200 x 400
    assert loaded.size == (200, 400)
    width, height = loaded.image.size
    assert 4500 < width * height <= 5000
    (box,) = loaded.scaled([[0, 300, 100, 400]])  # of the green quarter
    green = np.asarray(loaded.image.crop(tuple(map(round, box))))
    assert green[1:-1, 1:-1, 1].min() > 100
    assert np.asarray(loaded.image)[: height // 2, :, 1].max() < 60


def test_a_batch_of_large_images_is_small() -> None:
    data = encoded(Image.new("L", (9400, 9400)))
    width, height = load_image(data, "here").image.size
    assert width * height <= MAX_KEPT_PIXELS < 9400 * 9400


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_are_invalid() -> None:
    rng = random.Random(0)
    decoded = 0
    for kind in ("PNG", "JPEG", "WEBP"):
        for _ in range(200):
            data = bytearray(pil_image(kind, (12, 8)))
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(min(len(data), rng.choice([60, 200, 10_000])))] = rng.randrange(256)
            with suppress(InvalidImage):
                load_image(bytes(data[: rng.randrange(1, 2 * len(data))]), "here")
                decoded += 1
    assert 0 < decoded < 400


@pytest.mark.parametrize("limit", [40, 60])
def test_images_too_large_to_decode_are_invalid(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The image has 96 pixels, and Pillow only warns up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InvalidImage, match=r"^here .*bomb"):
        load_image(pil_image("PNG", (12, 8)), "here")


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("max_pixels", [100, MAX_KEPT_PIXELS])
def test_an_image_of_the_caller_is_not_changed(opened: bool, max_pixels: int) -> None:
    """The second request with the same image would have its boxes in another frame."""
    image = GREEN_CORNER.copy()
    source = Image.open(io.BytesIO(encoded(image, "JPEG"))) if opened else image
    before = np.asarray(source.copy())
    first, second = (load_image(source, "here", max_pixels) for _ in range(2))
    assert first.size == second.size == source.size == (100, 50)
    assert first.image.width * first.image.height <= max_pixels
    assert np.array_equal(np.asarray(source), before)
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_pillow_image_is_invalid(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidImage, match=f"empty image of {size[0]}x{size[1]}"):
        load_image(Image.new("RGB", size), "here")


def test_a_large_truncated_pillow_image_is_invalid() -> None:
    source = Image.open(io.BytesIO(encoded(GREEN_CORNER)[:-40]))
    with pytest.raises(InvalidImage, match="decoded"):
        load_image(source, "here", max_pixels=100)
