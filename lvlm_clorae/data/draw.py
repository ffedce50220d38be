"""A sample as one picture to look at: its image with boxes, its text with coloured spans, and what they stand for.

Pillow's own font is what is everywhere. It has Latin letters; others are drawn as the font's empty box.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image, ImageDraw, ImageFont

from lvlm_clorae.data.inspect import FoundSample, printable, sound_annotations
from lvlm_clorae.data.pictures import decode_picture
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import atomic_path

WIDTH = 800
"""Pixels of the content, and the most that the longer side of its image has."""
MARGIN = 24
ENLARGED = 512
"""An image whose longer side is at most half of this is enlarged, by the largest whole factor that keeps it below."""

# So much of a sample is drawn, which may have been made to be endless; the legend says what is left out.
MAX_TOKENS, MAX_SPANS, MAX_OBJECTS, MAX_EVENTS, MAX_ARGUMENTS = 1000, 200, 100, 20, 50
MAX_TOKEN, MAX_CHIP, MAX_WORDS = 120, 60, 300  # characters

Colour = tuple[int, int, int]
_Thing = TypeVar("_Thing")
WHITE, BLACK, GREY, SLATE = (255, 255, 255), (0, 0, 0), (110, 110, 118), (71, 85, 105)
TEXT, SMALL = 18, 13
CHIP, BAR, GAP = 18, 3, 4


class Span(NamedTuple):
    """Tokens `start` to `end` (half-open) and what they are."""

    start: int
    end: int
    label: str
    colour: Colour


def _span(mention: Mapping[str, Any], label: str, colour: Colour) -> Span:
    start, end = mention["span"]
    return Span(start, end, label, colour)


class Item(NamedTuple):
    """Words of the legend, or with a colour a chip."""

    text: str
    colour: Colour | None = None


@dataclass
class _Notes:
    """What a sample's annotation has to show."""

    spans: list[Span] = field(default_factory=list)
    tags: defaultdict[str, list[Item]] = field(default_factory=lambda: defaultdict(list))
    """By object id."""
    legend: list[list[Item]] = field(default_factory=list)

    def first(self, limit: int, what: str, things: Sequence[_Thing]) -> Sequence[_Thing]:
        """No more than `limit` of them, and a line of the legend where there are more."""
        if len(things) > limit:
            self.legend.append([Item(f"Only {limit} of {len(things)} {what} are drawn.")])
        return things[:limit]


def draw_sample(found: FoundSample) -> Image.Image:
    """The picture of a sample: without an image only its text, without a text only its image.

    Raises UserError, naming shard and key, where the image cannot be decoded.
    """
    sample = found.sample
    notes = _annotation(sample, label_colours({**found.labels, "ends": ("head", "tail")}))
    objects = notes.first(MAX_OBJECTS, "objects", sample.get("objects", []))
    tokens = notes.first(MAX_TOKENS, "tokens", sample["tokens"])
    spans = notes.first(MAX_SPANS, "spans", notes.spans)
    blocks = [_flow([[Item(f"{found.dataset}, {found.split}, {found.key}")]], GREY)]
    if found.image is not None:
        image = decode_picture(found.image, f"{found.shard}, {found.key}")
        blocks.append(_draw_image(image, objects, notes.tags))
    elif sample["image"] is not None:
        notes.legend.append([Item(f"Its picture {sample['image']} is missing.")])
    if tokens:
        blocks.append(_draw_text(tokens, spans))
    return _stack([*blocks, _flow(filter(None, notes.legend), BLACK)])


def write_png(picture: Image.Image, path: Path) -> None:
    """Write `picture` whole or not at all. Raises UserError where the file exists or cannot be written."""
    if os.path.lexists(path):
        raise UserError(f"{path}: is there already, and is not overwritten. Remove it or choose another name.")
    try:
        with atomic_path(path) as partial:
            picture.save(partial, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}). Choose another place.") from None


def label_colours(labels: Mapping[str, Iterable[str]]) -> dict[str, Colour]:
    """A colour for each label, the same in all samples of a dataset: hues by the golden ratio lie far apart."""
    names = dict.fromkeys(name for kind in labels.values() for name in kind)
    return {name: _nth_colour(number) for number, name in enumerate(names)}


def _nth_colour(number: int) -> Colour:
    lightness = (0.42, 0.58, 0.64, 0.28, 0.5)[number % 5]  # near hues come 8, 13 or 21 apart: in another step
    red, green, blue = hls_to_rgb((0.6 + number * 0.6180339887) % 1, lightness, 0.72)
    return round(red * 255), round(green * 255), round(blue * 255)


def _annotation(sample: Mapping[str, Any], colours: Mapping[str, Colour]) -> _Notes:
    """Spans, tags and legend."""
    notes, found = _Notes(), sound_annotations(sample)
    counts: Counter[Item] = Counter()
    for entity in notes.first(MAX_SPANS, "entities", found.get("entities", [])):
        label, colour = entity["type"], colours.get(entity["type"], SLATE)
        notes.spans.append(_span(entity, label, colour))
        counts[Item(label, colour)] += 1
    notes.legend.append([item for chip, count in counts.items() for item in (chip, Item(str(count)))])
    if "relation" in found:
        relation, ends = found["relation"], []
        for end in ("head", "tail"):
            notes.spans.append(_span(relation[end], end, colours[end]))
            ends += [Item(end, colours[end]), Item(relation[end]["text"])]
        label = relation["label"]
        notes.legend += [ends, [Item("relation"), Item(label, colours.get(label, SLATE))]]
    events = found.get("events", [])
    for number, event in enumerate(notes.first(MAX_EVENTS, "events", events), 1):
        _event(event, f" ({number})" if len(events) > 1 else "", colours, notes)
    notes.legend += [[Item(f"no {key}")] for key in found if not found[key]]
    return notes


def _event(event: Mapping[str, Any], suffix: str, colours: Mapping[str, Colour], notes: _Notes) -> None:
    """One event's spans, tags and line of the legend; `suffix` tells it from the sample's others."""
    kind, colour = event["type"] + suffix, colours.get(event["type"], SLATE)
    line = [Item(kind, colour)]
    if event["trigger"] is None:
        line.append(Item("without a trigger"))
    else:
        notes.spans.append(_span(event["trigger"], kind, colour))
        line.append(Item(event["trigger"]["text"]))
    fillers = defaultdict(list)
    for argument in notes.first(MAX_ARGUMENTS, "arguments", event["arguments"]):
        role, colour = argument["role"] + suffix, colours.get(argument["role"], SLATE)
        if "object" in argument:
            notes.tags[argument["object"]].append(Item(role, colour))
        else:
            notes.spans.append(_span(argument, role, colour))
        fillers[Item(argument["role"], colour)].append(argument.get("object") or argument["text"])
    notes.legend.append([*line, *(item for role, names in fillers.items() for item in (role, Item(", ".join(names))))])


def _draw_image(
    image: Image.Image, objects: Sequence[Mapping[str, Any]], tags: Mapping[str, list[Item]]
) -> Image.Image:
    """The image at a size to look at, each box in the colour of its first role, each box's tag where none is yet."""
    scale = _scale(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    shown = image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    top = CHIP if objects else 0  # room for the tags of boxes at the top
    block = Image.new("RGB", (WIDTH, top + height), WHITE)
    block.paste(shown, (0, top))
    draw = ImageDraw.Draw(block)
    placed: list[tuple[int, int, int, int]] = []
    tagged = []
    for item in objects:
        # Clipped before it is scaled: a box may be anywhere, as far as a number can reach.
        x1, x2 = (round(min(max(x, 0), image.width) * scale) for x in (item["box"][0], item["box"][2]))
        y1, y2 = (top + round(min(max(y, 0), image.height) * scale) for y in (item["box"][1], item["box"][3]))
        box = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        roles = tags.get(item["id"], [])
        colour = (roles[0].colour if roles else None) or SLATE
        draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=WHITE, width=BAR + 2)
        draw.rectangle(box, outline=colour, width=BAR)
        words = [item["id"], item.get("label", ""), ", ".join(role.text for role in roles)]
        tagged.append((box, " ".join(filter(None, words)), colour))
    for box, text, colour in tagged:
        size = (_chip_width(text), CHIP)
        spot = _free_spot(box, size, block.size, placed)
        placed.append((*spot, spot[0] + size[0], spot[1] + size[1]))
        _chip(draw, spot, text, colour)
    return block


def _scale(size: tuple[int, int]) -> float:
    longer = max(size)
    return WIDTH / longer if longer > WIDTH else max(1, ENLARGED // longer)


def _free_spot(
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    area: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int]:
    """Top left of a tag: above its box, inside or below it, else as far down as it takes not to cover another tag."""
    (x1, y1, x2, y2), (width, height) = box, size
    left, right = min(x1, area[0] - width), max(0, x2 + 1 - width)
    spots = [(x, y) for y in (y1 - height, y1, y2 + 1, y2 + 1 - height) for x in (left, right)]
    spots += [(left, y) for y in range(y1, area[1] - height, height // 2)]
    for x, y in spots:
        inside = 0 <= y <= area[1] - height
        if inside and not any(x < c and a < x + width and y < d and b < y + height for a, b, c, d in taken):
            return x, y
    return left, min(max(0, y1 - height), area[1] - height)


def _draw_text(tokens: Sequence[str], spans: Sequence[Span]) -> Image.Image:
    """The wrapped text, spans tinted, and under each line a lane of bars and chips for spans that do not collide."""
    placed: list[tuple[int, int, list[_Word], list[_Mark]]] = []
    top = 0
    ordered = sorted(spans, key=lambda span: (span.start, -span.end, span.label))
    for line in _lines(tokens):
        lanes: list[int] = []  # where the last mark of each lane ends
        marks: list[_Mark] = []
        for span in ordered:
            words = [word for word in line if span.start <= word.token < span.end]
            if not words:
                continue
            x1, x2 = words[0].left, words[-1].right
            chip = min(x1, WIDTH - _chip_width(span.label))
            lane = next((n for n, end in enumerate(lanes) if end + GAP <= min(x1, chip)), len(lanes))
            lanes[lane : lane + 1] = [max(x2, chip + _chip_width(span.label))]
            marks.append(_Mark(span, lane, x1, x2, chip))
        lane_top = top + TEXT + 2 * GAP
        placed.append((top, lane_top, line, marks))
        top = lane_top + len(lanes) * (BAR + CHIP + GAP) + GAP
    block = Image.new("RGB", (WIDTH, top), WHITE)
    draw = ImageDraw.Draw(block)
    for top, lane_top, line, marks in placed:
        for mark in marks:
            draw.rectangle((mark.left - 1, top, mark.right, lane_top - 2), fill=_tint(mark.span.colour))
        for word in line:
            draw.text((word.left, top + TEXT // 2 + GAP), word.text, BLACK, _font(TEXT), anchor="lm")
        for mark in marks:
            y = lane_top + mark.lane * (BAR + CHIP + GAP)
            draw.rectangle((mark.left - 1, y, mark.right, y + BAR - 1), fill=mark.span.colour)
            _chip(draw, (mark.chip, y + BAR), mark.span.label, mark.span.colour)
    return block


class _Word(NamedTuple):
    """A token, or a part of one that is wider than the line, and where it stands."""

    token: int
    text: str
    left: int
    right: int


class _Mark(NamedTuple):
    """A span's part in one line: its lane, its bar from `left` to `right`, and where its chip begins."""

    span: Span
    lane: int
    left: int
    right: int
    chip: int


def _lines(tokens: Sequence[str]) -> Iterator[list[_Word]]:
    line: list[_Word] = []
    space = round(_font(TEXT).getlength(" "))
    for number, token in enumerate(tokens):
        for text in _parts(drawable(token, MAX_TOKEN), TEXT):
            width = round(_font(TEXT).getlength(text))
            left = line[-1].right + space if line else 1
            if line and left + width > WIDTH:
                yield line
                line, left = [], 1
            line.append(_Word(number, text, left, left + width))
    yield line


def _flow(rows: Iterable[Sequence[Item]], colour: Colour) -> Image.Image:
    """Rows of words and chips, wrapped."""
    placed: list[tuple[int, int, Item]] = []
    y = 0
    for row in rows:
        x = 0
        for item in row:
            for word in _words(item):
                width = _chip_width(word.text) if word.colour else round(_font(SMALL + 2).getlength(word.text))
                if x and x + width > WIDTH:
                    x, y = 0, y + CHIP + GAP
                placed.append((x, y, word))
                x += width + GAP
            x += 2 * GAP
        y += CHIP + 2 * GAP
    block = Image.new("RGB", (WIDTH, max(y - 2 * GAP, 1)), WHITE)
    draw = ImageDraw.Draw(block)
    for x, y, item in placed:
        if item.colour is None:
            draw.text((x, y + CHIP // 2), item.text, colour, _font(SMALL + 2), anchor="lm")
        else:
            _chip(draw, (x, y), item.text, item.colour)
    return block


def _words(item: Item) -> list[Item]:
    """What may be put on a line of its own."""
    if item.colour:
        return [item]
    return [Item(part) for word in drawable(item.text, MAX_WORDS).split() for part in _parts(word, SMALL + 2)]


def _stack(blocks: Sequence[Image.Image]) -> Image.Image:
    height = sum(block.height for block in blocks) + MARGIN * (len(blocks) + 1)
    picture = Image.new("RGB", (WIDTH + 2 * MARGIN, height), WHITE)
    y = MARGIN
    for block in blocks:
        picture.paste(block, (MARGIN, y))
        y += block.height + MARGIN
    return picture


def drawable(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters, as the font can best show it: without accents, for it has few letters so."""
    letters = unicodedata.normalize("NFKD", text[: limit + 1])
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return printable(plain if len(plain) <= limit else f"{plain[: limit - 3]}...")


def _chip(draw: ImageDraw.ImageDraw, spot: tuple[int, int], text: str, colour: Colour) -> None:
    x, y = spot
    draw.rectangle((x, y, x + _chip_width(text) - 1, y + CHIP - 1), fill=colour)
    draw.text((x + GAP, y + CHIP // 2), drawable(text, MAX_CHIP), _ink(colour), _font(SMALL), anchor="lm")


def _chip_width(text: str) -> int:
    return round(_font(SMALL).getlength(drawable(text, MAX_CHIP))) + 2 * GAP


def _parts(text: str, size: int) -> Iterator[str]:
    """`text`, in parts where it is wider than the line."""
    part = ""
    for char in text:
        if _font(size).getlength(part + char) > WIDTH - 1:
            yield part
            part = ""
        part += char
    yield part


def _ink(colour: Colour) -> Colour:
    """White or black, whichever reads better on `colour`: a contrast of about 4.5 or more, what WCAG 2 asks for."""
    red, green, blue = ((value / 255) ** 2.2 for value in colour)
    return BLACK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else WHITE


def _tint(colour: Colour) -> Colour:
    red, green, blue = (255 - (255 - value) // 4 for value in colour)
    return red, green, blue


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
