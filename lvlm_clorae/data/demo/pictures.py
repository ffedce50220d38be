"""Small flat pictures of things, drawn with Pillow: what the demo's vision tower has to read."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

SIZE = 64
"""Width and height of a picture in pixels."""

_CELLS = ((2, 2), (34, 2), (2, 34), (34, 34))
Draw = ImageDraw.ImageDraw
Colour = tuple[int, int, int]


def _person(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.ellipse((x + s * 0.32, y, x + s * 0.68, y + s * 0.36), fill=(236, 188, 150))
    d.rectangle((x + s * 0.2, y + s * 0.4, x + s * 0.8, y + s), fill=c)


def _tower(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.rectangle((x + s * 0.3, y, x + s * 0.7, y + s), fill=c)
    for row in range(3):
        d.rectangle(
            (x + s * 0.42, y + s * (0.12 + 0.3 * row), x + s * 0.58, y + s * (0.26 + 0.3 * row)), fill=(255, 240, 120)
        )


def _badge(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.ellipse((x, y, x + s, y + s), fill=c)
    d.ellipse((x + s * 0.25, y + s * 0.25, x + s * 0.75, y + s * 0.75), fill=(255, 255, 255))


def _trophy(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.polygon(((x, y), (x + s, y), (x + s * 0.6, y + s * 0.6), (x + s * 0.4, y + s * 0.6)), fill=c)
    d.rectangle((x + s * 0.2, y + s * 0.8, x + s * 0.8, y + s), fill=c)


def _heart(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.ellipse((x, y, x + s * 0.55, y + s * 0.55), fill=c)
    d.ellipse((x + s * 0.45, y, x + s, y + s * 0.55), fill=c)
    d.polygon(((x, y + s * 0.38), (x + s, y + s * 0.38), (x + s * 0.5, y + s)), fill=c)


def _briefcase(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.rectangle((x + s * 0.3, y + s * 0.1, x + s * 0.7, y + s * 0.3), outline=c, width=2)
    d.rectangle((x, y + s * 0.3, x + s, y + s * 0.9), fill=c)


def _bottle(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.rectangle((x + s * 0.3, y + s * 0.35, x + s * 0.7, y + s), fill=(250, 250, 250), outline=c, width=2)
    d.rectangle((x + s * 0.4, y, x + s * 0.6, y + s * 0.3), fill=c)


def _tank(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.rectangle((x, y + s * 0.55, x + s, y + s * 0.95), fill=c)
    d.rectangle((x + s * 0.25, y + s * 0.3, x + s * 0.65, y + s * 0.55), fill=c)
    d.line((x + s * 0.6, y + s * 0.38, x + s, y + s * 0.15), fill=c, width=3)


def _truck(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.rectangle((x, y + s * 0.2, x + s * 0.65, y + s * 0.8), fill=c)
    d.rectangle((x + s * 0.68, y + s * 0.45, x + s, y + s * 0.8), fill=c)
    for wheel in (0.1, 0.7):
        d.ellipse((x + s * wheel, y + s * 0.75, x + s * (wheel + 0.22), y + s), fill=(20, 20, 20))


def _boat(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.polygon(((x, y + s * 0.65), (x + s, y + s * 0.65), (x + s * 0.8, y + s), (x + s * 0.2, y + s)), fill=c)
    d.polygon(((x + s * 0.5, y), (x + s * 0.5, y + s * 0.6), (x + s * 0.9, y + s * 0.6)), fill=(250, 250, 250))


def _cuffs(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.ellipse((x, y + s * 0.25, x + s * 0.48, y + s * 0.75), outline=c, width=3)
    d.ellipse((x + s * 0.52, y + s * 0.25, x + s, y + s * 0.75), outline=c, width=3)


def _placard(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.rectangle((x, y, x + s, y + s * 0.55), fill=(250, 250, 250), outline=c, width=3)
    d.rectangle((x + s * 0.45, y + s * 0.55, x + s * 0.55, y + s), fill=(120, 80, 40))


def _table(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.rectangle((x, y + s * 0.3, x + s, y + s * 0.45), fill=c)
    for leg in (0.08, 0.8):
        d.rectangle((x + s * leg, y + s * 0.45, x + s * (leg + 0.12), y + s), fill=c)


def _tree(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.polygon(((x + s * 0.5, y), (x + s, y + s * 0.7), (x, y + s * 0.7)), fill=c)
    d.rectangle((x + s * 0.42, y + s * 0.7, x + s * 0.58, y + s), fill=(110, 70, 30))


def _sun(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.ellipse((x + s * 0.2, y + s * 0.2, x + s * 0.8, y + s * 0.8), fill=c)
    d.line((x + s * 0.5, y, x + s * 0.5, y + s), fill=c, width=2)
    d.line((x, y + s * 0.5, x + s, y + s * 0.5), fill=c, width=2)


def _ball(d: Draw, x: int, y: int, s: int, c: Colour) -> None:
    d.ellipse((x + s * 0.1, y + s * 0.1, x + s * 0.9, y + s * 0.9), fill=(250, 250, 250), outline=c, width=2)
    d.line((x + s * 0.2, y + s * 0.2, x + s * 0.8, y + s * 0.8), fill=c, width=2)


ICONS: dict[str, tuple[Callable[[Draw, int, int, int, Colour], None], Colour]] = {
    "person": (_person, (60, 90, 200)),
    "tower": (_tower, (110, 110, 130)),
    "badge": (_badge, (200, 40, 160)),
    "trophy": (_trophy, (220, 170, 20)),
    "heart": (_heart, (220, 30, 50)),
    "briefcase": (_briefcase, (100, 60, 20)),
    "bottle": (_bottle, (60, 190, 220)),
    "tank": (_tank, (70, 90, 40)),
    "truck": (_truck, (220, 110, 20)),
    "boat": (_boat, (20, 60, 130)),
    "cuffs": (_cuffs, (50, 50, 60)),
    "placard": (_placard, (180, 20, 20)),
    "table": (_table, (150, 90, 40)),
    "tree": (_tree, (30, 140, 50)),
    "sun": (_sun, (250, 200, 30)),
    "ball": (_ball, (30, 30, 30)),
}


def draw(things: list[str], rng: random.Random) -> tuple[bytes, list[list[int]]]:
    """Draw up to four things at random places.

    Returns the PNG's bytes and for each thing its box ``[x1, y1, x2, y2]`` in pixels, in the order of ``things``.
    """
    shade = rng.randrange(196, 232)
    picture = Image.new("RGB", (SIZE, SIZE), (shade, shade, min(255, shade + rng.randrange(24))))
    canvas = ImageDraw.Draw(picture)
    boxes = []
    for name, (cell_x, cell_y) in zip(things, rng.sample(_CELLS, len(things)), strict=True):
        side = rng.randrange(22, 28)
        x, y = cell_x + rng.randrange(28 - side + 1), cell_y + rng.randrange(28 - side + 1)
        paint, base = ICONS[name]
        red, green, blue = (max(0, min(255, part + rng.randrange(-18, 19))) for part in base)
        paint(canvas, x, y, side, (red, green, blue))
        boxes.append([x, y, x + side, y + side])
    buffer = io.BytesIO()
    picture.quantize(16).save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), boxes
