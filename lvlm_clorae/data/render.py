"""Rendering of a sample as one figure: its image with boxes, its text with marked spans, and a legend.

The text is monospaced, so the layout is a grid of cells. matplotlib brings its fonts along; a character that they do
not have (Chinese, Korean) is rendered as a box.
"""

import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from colorsys import hls_to_rgb
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lvlm_clorae import files
from lvlm_clorae.data.images import load_image
from lvlm_clorae.data.inspect import FoundSample, printable
from lvlm_clorae.tasks.schema import checked_annotations

Colour = tuple[float, float, float]

COLUMNS, CHAR, ROW, BAR, MARGIN = 100, 8, 18, 3, 24  # cells of a line; then sizes in points
WIDTH = COLUMNS * CHAR
ENLARGED = 512  # an image of at most half of this is enlarged by the largest integer factor that stays below it
LIMITS = {"tokens": 1000, "objects": 100, "annotations": 200}
"""What is rendered of a sample at most, which can be arbitrarily large; the legend says what is left out."""
SLATE = (0.28, 0.33, 0.41)  # colour of an unknown label, and of an object without a role


class Mark(NamedTuple):
    """An annotation: its row in the legend, label and colour, and the mention or argument."""

    row: int
    label: str
    colour: Colour
    item: Mapping[str, Any]


def render_sample(found: FoundSample) -> Figure:
    """Render a sample; without an image only its text, and without a text only its image.

    Raises UserError, with shard and key, if the image cannot be decoded.
    """
    sample, page = found.sample, _Page()
    colours = label_colours({**found.labels, "ends": ("head", "tail")})
    shown = {"objects": [], **sample, "annotations": list(_marks(sample, colours))}
    sizes = [(len(shown[name]), limit, name) for name, limit in LIMITS.items()]
    notes = [f"Only {limit} of {size} {name} are shown." for size, limit, name in sizes if size > limit]
    notes += [f"no {key}" for key, value in checked_annotations(sample).items() if not value]
    tokens, objects, marks = (shown[name][:limit] for name, limit in LIMITS.items())
    page.flow([(f"{found.dataset}, {found.split}, {found.key}", None)])
    if found.image is not None:
        loaded = load_image(found.image, f"{found.shard}, {found.key}: its image")
        boxes = loaded.scaled(item["box"] for item in objects)
        page.image(loaded.image, [{**item, "box": box} for item, box in zip(objects, boxes, strict=True)], marks)
    elif sample["image"] is not None:
        notes.append(f"Its image {sample['image']} is missing.")
    page.text(tokens, [mark for mark in marks if "span" in mark.item])
    legend: dict[int, dict[tuple[str, Colour], list[str]]] = {}
    for row, label, colour, item in marks:
        legend.setdefault(row, {}).setdefault((label, colour), []).append(item.get("object") or item["text"])
    for chips in legend.values():
        page.flow([part for chip, names in chips.items() for part in (chip, (", ".join(names), None))])
    for note in notes:
        page.flow([(note, None)])
    page.axes.set(xlim=(-MARGIN, WIDTH + MARGIN), ylim=(page.y + MARGIN, -MARGIN), aspect="auto")
    page.figure.set_size_inches((WIDTH + 2 * MARGIN) / 72, (page.y + 2 * MARGIN) / 72)
    return page.figure


def write_png(figure: Figure, path: Path) -> None:
    """Write a rendered sample. Raises UserError if the file exists or cannot be written."""
    files.check_free(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        files.write_png(figure, path)


def label_colours(labels: Mapping[str, Iterable[str]]) -> dict[str, Colour]:
    """Return a colour for each label, the same in all samples of a dataset, with hues spaced by the golden ratio."""
    names = dict.fromkeys(name for group in labels.values() for name in group)
    lightness = (0.42, 0.58, 0.64, 0.28, 0.5)  # similar hues are 8, 13 or 21 labels apart, so they differ in this
    return {name: hls_to_rgb((0.6 + n * 0.6180339887) % 1, lightness[n % 5], 0.72) for n, name in enumerate(names)}


def text_colour(background: Colour) -> str:
    """Return white or black, whichever has a contrast of about 4.5 or more, as WCAG 2 requires."""
    red, green, blue = (value**2.2 for value in background)
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def renderable(text: str, limit: int = 50) -> str:
    """Truncate `text` to `limit` characters, and remove those without a width."""
    plain = "".join(letter for letter in unicodedata.normalize("NFC", text) if not unicodedata.combining(letter))
    return printable(plain if len(plain) <= limit else f"{plain[: limit - 3]}...")


def _cells(text: str) -> int:
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def _lines(words: Iterable[str]) -> Iterator[list[tuple[int, int, str]]]:
    """Yield the lines of a text as (number, column, word)."""
    line: list[tuple[int, int, str]] = []
    column = 0
    for number, word in enumerate(words):
        if line and column + _cells(word) > COLUMNS:
            yield line
            line, column = [], 0
        line.append((number, column, word))
        column += _cells(word) + 1
    yield line


def _marks(sample: Mapping[str, Any], colours: Mapping[str, Colour]) -> Iterator[Mark]:
    """Yield the annotations; the labels of several events are numbered."""
    found = checked_annotations(sample)
    rows = [[(entity["type"], entity) for entity in found.get("entities", ())]]
    if "relation" in found:
        relation = found["relation"]
        rows[0] += [("head", relation["head"]), ("tail", relation["tail"]), (relation["label"], {"text": ""})]
    rows[0] += [
        (link["label"], {"text": f"{link['head']['text']} > {link['tail']['text']}"}) for link in found.get("links", ())
    ]
    for event in found.get("events", ()):
        arguments = [(argument["role"], argument) for argument in event["arguments"]]
        rows.append([(event["type"], event["trigger"] or {"text": "without a trigger"}), *arguments])
    for number, row in enumerate(rows):
        suffix = f" ({number})" if number and len(rows) > 2 else ""
        yield from (Mark(number, label + suffix, colours.get(label, SLATE), item) for label, item in row)


class _Page:
    """A figure that is filled from top to bottom; coordinates are points from the upper left corner of its content."""

    def __init__(self) -> None:
        self.figure, self.y = Figure(dpi=144), 0.0
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")

    def bar(self, x: float, y: float, width: float, height: float, colour: Colour, alpha: float = 1) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, alpha=alpha, linewidth=0))

    def write(self, x: float, y: float, text: str, colour: Colour | None = None) -> None:
        """Write black text, or white or black text on a colour."""
        if colour:
            self.bar(x, y, CHAR * _cells(text), ROW, colour)
        style: dict[str, Any] = {"family": ["DejaVu Sans Mono", "DejaVu Sans"], "size": CHAR / 0.602}
        style["color"] = text_colour(colour) if colour else "black"
        self.axes.text(x, y + 0.72 * ROW, text, parse_math=False, **style)

    def flow(self, items: Iterable[tuple[str, Colour | None]]) -> None:
        """Add lines of words, and chips if they have a colour."""
        parts: list[tuple[str, Colour | None]] = []
        for text, colour in items:
            words = [f" {text} "] if colour else renderable(text, 300).split()
            parts += [(renderable(word), colour) for word in words]
        for line in _lines(part for part, _ in parts):
            for number, column, part in line:
                self.write(CHAR * column, self.y, part, parts[number][1])
            self.y += ROW + BAR
        self.y += 2 * BAR

    def image(self, image: Image.Image, objects: Iterable[Mapping[str, Any]], marks: Sequence[Mark]) -> None:
        """Add the scaled image, each box in the colour of its first role with a tag at a free position."""
        longer, top = max(image.size), self.y + ROW  # for the tags of boxes at the upper edge
        scale = WIDTH / longer if longer > WIDTH else max(1, ENLARGED // longer)
        self.y = top + image.height * scale
        extent = (0, image.width * scale, self.y, top)
        self.axes.imshow(image, extent=extent, interpolation="nearest" if scale >= 1 else "antialiased")
        tags: list[tuple[float, float, float]] = []
        for item in objects:
            # Clipped before scaling, because coordinates can be arbitrarily large.
            left, right = (min(max(x, 0), image.width) * scale for x in item["box"][::2])
            upper, lower = (top + min(max(y, 0), image.height) * scale for y in item["box"][1::2])
            roles = [mark for mark in marks if mark.item.get("object") == item["id"]]
            colour = roles[0].colour if roles else SLATE
            for edge, line in (("white", BAR + 2), (colour, BAR)):
                box = Rectangle((left, upper), right - left, lower - upper, fill=False, edgecolor=edge, linewidth=line)
                self.axes.add_patch(box)
            words = [item["id"], item.get("label", ""), ", ".join(mark.label for mark in roles)]
            text = f" {renderable(' '.join(filter(None, words)))} "
            left = min(left, WIDTH - CHAR * _cells(text))
            right = left + CHAR * _cells(text)
            rows = (upper - ROW, *range(round(upper), round(self.y), ROW), *range(round(top), round(upper) - ROW, ROW))
            free = (y for y in rows if not any(abs(y - v) < ROW and left < b and a < right for v, a, b in tags))
            tags.append((next(free, rows[0]), left, right))
            self.write(left, tags[-1][0], text, colour)
        self.y += ROW

    def text(self, tokens: Iterable[str], marks: Iterable[Mark]) -> None:
        """Add lines of words with tinted spans, and below each line rows of bars and chips that do not overlap."""
        marks = sorted(marks, key=lambda mark: (mark.item["span"][0], -mark.item["span"][1], mark.label))
        for line in _lines(map(renderable, tokens)):
            ends: list[int] = []  # column at which the last chip or bar of each row ends
            for _, name, colour, item in marks:
                start, stop = item["span"]
                extents = [(column, column + _cells(word)) for number, column, word in line if start <= number < stop]
                if not extents:
                    continue
                left, right, label = extents[0][0], extents[-1][1], f" {renderable(name)} "
                chip = min(left, COLUMNS - _cells(label))
                row = next((n for n, end in enumerate(ends) if end < chip), len(ends))
                ends[row : row + 1] = [max(right, chip + _cells(label))]
                x, width, y = CHAR * left, CHAR * (right - left), self.y + ROW + row * (ROW + 2 * BAR)
                self.bar(x, self.y, width, ROW, colour, 0.25)
                self.bar(x, y, width, BAR, colour)
                self.write(CHAR * chip, y + BAR, label, colour)
            for _, column, word in line:
                self.write(CHAR * column, self.y, word)
            self.y += 1.5 * ROW + len(ends) * (ROW + 2 * BAR)
