"""Small images of icons, rendered with Pillow, as input of the demo's vision tower."""

import io
import random

from PIL import Image, ImageDraw

SIZE = 64
"""Width and height of an image in pixels."""

Colour = tuple[int, int, int]

_CELLS = ((2, 2), (34, 2), (2, 34), (34, 34))
_COLOURS = {
    "skin": (236, 188, 150), "window": (255, 240, 120), "white": (255, 255, 255), "paper": (250, 250, 250),
    "black": (20, 20, 20), "wood": (120, 80, 40), "trunk": (110, 70, 30),
}  # fmt: skip
ICONS: dict[str, tuple[Colour, str]] = {
    "person": ((60, 90, 200), "ellipse .32 0 .68 .36 fill=skin; rectangle .2 .4 .8 1"),
    "tower": (
        (110, 110, 130),
        "rectangle .3 0 .7 1; rectangle .42 .12 .58 .26 fill=window; rectangle .42 .42 .58 .56 fill=window; "
        "rectangle .42 .72 .58 .86 fill=window",
    ),
    "badge": ((200, 40, 160), "ellipse 0 0 1 1; ellipse .25 .25 .75 .75 fill=white"),
    "trophy": ((220, 170, 20), "polygon 0 0 1 0 .6 .6 .4 .6; rectangle .2 .8 .8 1"),
    "heart": ((220, 30, 50), "ellipse 0 0 .55 .55; ellipse .45 0 1 .55; polygon 0 .38 1 .38 .5 1"),
    "briefcase": ((100, 60, 20), "rectangle .3 .1 .7 .3 fill=no width=2; rectangle 0 .3 1 .9"),
    "bottle": ((60, 190, 220), "rectangle .3 .35 .7 1 fill=paper width=2; rectangle .4 0 .6 .3"),
    "tank": ((70, 90, 40), "rectangle 0 .55 1 .95; rectangle .25 .3 .65 .55; line .6 .38 1 .15 width=3"),
    "truck": (
        (220, 110, 20),
        "rectangle 0 .2 .65 .8; rectangle .68 .45 1 .8; ellipse .1 .75 .32 1 fill=black; "
        "ellipse .7 .75 .92 1 fill=black",
    ),
    "boat": ((20, 60, 130), "polygon 0 .65 1 .65 .8 1 .2 1; polygon .5 0 .5 .6 .9 .6 fill=paper"),
    "cuffs": ((50, 50, 60), "ellipse 0 .25 .48 .75 fill=no width=3; ellipse .52 .25 1 .75 fill=no width=3"),
    "placard": ((180, 20, 20), "rectangle 0 0 1 .55 fill=paper width=3; rectangle .45 .55 .55 1 fill=wood"),
    "table": ((150, 90, 40), "rectangle 0 .3 1 .45; rectangle .08 .45 .2 1; rectangle .8 .45 .92 1"),
    "tree": ((30, 140, 50), "polygon .5 0 1 .7 0 .7; rectangle .42 .7 .58 1 fill=trunk"),
    "sun": ((250, 200, 30), "ellipse .2 .2 .8 .8; line .5 0 .5 1 width=2; line 0 .5 1 .5 width=2"),
    "ball": ((30, 30, 30), "ellipse .1 .1 .9 .9 fill=paper width=2; line .2 .2 .8 .8 width=2"),
}
"""Name -> colour and shapes: a method of ImageDraw, x and y of its points as fractions of the icon's side, and options.
A shape is filled with the icon's colour, or with `fill` ("no" for none); `width` is its outline in that colour."""


def render(names: list[str], rng: random.Random) -> tuple[bytes, list[list[int]]]:
    """Render up to four icons at random positions.

    Returns:
        the bytes of a PNG, and for each icon its box ``[x1, y1, x2, y2]`` in pixels, in the order of `names`
    """
    shade = rng.randrange(196, 232)
    image = Image.new("RGB", (SIZE, SIZE), (shade, shade, min(255, shade + rng.randrange(24))))
    canvas = ImageDraw.Draw(image)
    boxes = []
    for name, (cell_x, cell_y) in zip(names, rng.sample(_CELLS, len(names)), strict=True):
        side = rng.randrange(22, 28)
        x, y = cell_x + rng.randrange(28 - side + 1), cell_y + rng.randrange(28 - side + 1)
        base, shapes = ICONS[name]
        red, green, blue = (max(0, min(255, part + rng.randrange(-18, 19))) for part in base)
        for shape in shapes.split("; "):
            _render_shape(canvas, shape, (x, y), side, (red, green, blue))
        boxes.append([x, y, x + side, y + side])
    buffer = io.BytesIO()
    image.quantize(16).save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), boxes


def _render_shape(canvas: ImageDraw.ImageDraw, shape: str, corner: tuple[int, int], side: int, colour: Colour) -> None:
    method, *words = shape.split()
    options = dict(word.split("=") for word in words if "=" in word)
    values = [float(word) for word in words if "=" not in word]
    points = [corner[index % 2] + side * value for index, value in enumerate(values)]
    fill = None if options.get("fill") == "no" else _COLOURS.get(options.get("fill", ""), colour)
    width = int(options.get("width", 0))
    if method == "line":
        canvas.line(points, fill=fill, width=width)
    else:
        outline = {"outline": colour, "width": width} if width else {}
        getattr(canvas, method)(points, fill=fill, **outline)
