"""The drawn sample: boxes and spans where they belong, anything a sample may be, a file never overwritten."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lvlm_clorae import cli
from lvlm_clorae.data import draw
from lvlm_clorae.data.draw import Colour, _free_spot, _ink, _nth_colour, draw_sample, drawable, label_colours, write_png
from lvlm_clorae.data.inspect import FoundSample
from lvlm_clorae.data.shards import ShardWriter
from lvlm_clorae.errors import UserError

from .helpers import SPEC, picture, sample, write_toy

LABELS = {"event_types": ["attack", "meet"], "argument_roles": ["agent", "place"]}
COLOURS = label_colours(LABELS)


def _found(item: dict[str, Any], image: bytes | None = None, labels: dict[str, list[str]] | None = None) -> FoundSample:
    return FoundSample(
        0, "toy", "train", "toy-train-000000.tar", "k", item, image, labels or {"entity_types": ["person"]}
    )


def _scene(boxes: list[list[float]], arguments: list[dict[str, Any]], text: str = "") -> dict[str, Any]:
    tokens = text.split()
    events = [{"type": "attack", "trigger": None, "arguments": arguments}]
    return {**sample(image="a", boxes=boxes), "task": "mee", "tokens": tokens, "text": text, "events": events}


def _pixels(picture: Image.Image, colour: Colour) -> set[tuple[int, int]]:
    """Where a colour is."""
    width, height = picture.size
    pixels = picture.load()
    assert pixels is not None
    return {(x, y) for x in range(width) for y in range(height) if pixels[x, y] == colour}


def _origin(drawn: Image.Image, colour: Colour) -> tuple[int, int]:
    return min(_pixels(drawn, colour), key=lambda place: (place[1], place[0]))


@pytest.mark.parametrize(
    ("size", "scale"),
    [((64, 64), 8), ((300, 100), 1), ((256, 16), 2), ((800, 600), 1), ((1600, 400), 0.5), ((4, 1), 128)],
)
def test_the_image_is_brought_to_a_size_to_look_at(size: tuple[int, int], scale: float) -> None:
    drawn = draw_sample(_found({**sample(image="a"), "entities": []}, picture(size=size, colour=200)))
    places = _pixels(drawn, (200, 20, 30))
    xs, ys = {x for x, _ in places}, {y for _, y in places}
    assert (len(xs), len(ys)) == (size[0] * scale, size[1] * scale)
    assert min(xs) == draw.MARGIN


def test_boxes_are_drawn_at_their_edges_in_the_colour_of_their_role() -> None:
    boxes = [[8, 16, 40, 30], [5, 40, 20, 60], [50, 34, 60, 60]]
    arguments = [{"role": "agent", "object": "O1"}, {"role": "place", "object": "O2"}]
    drawn = draw_sample(_found(_scene(boxes, arguments), picture(size=(64, 64), colour=200), LABELS))
    left, top = _origin(drawn, (200, 20, 30))
    for box, colour in zip(boxes, (COLOURS["agent"], COLOURS["place"], draw.SLATE), strict=True):
        x1, y1, x2, y2 = (left + 8 * box[0], top + 8 * box[1], left + 8 * box[2] - 1, top + 8 * box[3] - 1)
        middle = ((x1 + x2) // 2, (y1 + y2) // 2)
        for place in ((x1, middle[1]), (x2, middle[1]), (middle[0], y1), (middle[0], y2), (x1, y1), (x2, y2)):
            assert drawn.getpixel(place) == colour, (box, place)
        assert drawn.getpixel(middle) == (200, 20, 30)
        for place in ((x1 - 1, middle[1]), (x2 + 1, middle[1]), (middle[0], y2 + 1)):
            assert drawn.getpixel(place) == draw.WHITE
    assert COLOURS["agent"] != COLOURS["place"]


def test_boxes_outside_the_image_are_clipped() -> None:
    boxes: list[list[float]] = [[-(10**400), -5, 10**400, 50], [900, 900, 1e300, 1e300]]
    drawn = draw_sample(
        _found(_scene(boxes, [{"role": "agent", "object": "O1"}]), picture(size=(64, 64), colour=200), LABELS)
    )
    left, top = _origin(drawn, (200, 20, 30))
    assert drawn.getpixel((left, top + 200)) != draw.WHITE
    found = _pixels(drawn.crop((0, 0, drawn.width, top + 520)), COLOURS["agent"])
    assert min(x for x, _ in found) == draw.MARGIN


def test_tags_of_boxes_do_not_cover_one_another() -> None:
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(20):
        x, y = _free_spot((10, 30, 60, 90), (100, 18), (800, 500), taken)
        assert 0 <= x <= 700
        assert 0 <= y <= 482
        assert not any(x < c and a < x + 100 and y < d and b < y + 18 for a, b, c, d in taken)
        taken.append((x, y, x + 100, y + 18))
    full = [(0, 0, 800, 500)]
    assert _free_spot((10, 30, 60, 90), (100, 18), (800, 500), full) == (10, 12)


def test_spans_have_the_colours_of_their_labels() -> None:
    labels = {"entity_types": ["person", "location"]}
    colours = label_colours(labels)
    item = sample()
    item["entities"].append({"type": "location", "span": [3, 4], "text": "0"})
    drawn = draw_sample(_found(item, labels=labels))
    persons, locations = _pixels(drawn, colours["person"]), _pixels(drawn, colours["location"])
    assert persons
    assert locations
    under = drawn.height - 2 * draw.MARGIN - draw.CHIP  # above the legend
    assert max(x for x, y in persons if y < under) < min(x for x, y in locations if y < under)


def test_a_span_over_two_lines_is_marked_in_both() -> None:
    tokens = ["word"] * 60
    item = {**sample(), "tokens": tokens, "text": " ".join(tokens)}
    item["entities"] = [{"type": "person", "span": [0, 60], "text": item["text"]}]
    drawn = draw_sample(_found(item))
    colour = label_colours({"": ["person"]})["person"]
    wide = [y for y in range(drawn.height) if sum(drawn.getpixel((x, y)) == colour for x in range(drawn.width)) > 500]
    assert len(wide) == 3 * draw.BAR  # a bar for each full line; the last line's is shorter


def test_nested_spans_have_lanes_of_their_own() -> None:
    tokens = ["University", "of", "Tamsk"]
    item = {**sample(), "tokens": tokens, "text": " ".join(tokens), "entities": []}
    heights = []
    for span in ([0, 3], [2, 3], [1, 3]):
        item["entities"].append({"type": "person", "span": span, "text": " ".join(tokens[slice(*span)])})
        heights.append(draw_sample(_found(item)).height)
    step = draw.BAR + draw.CHIP + draw.GAP
    assert [height - heights[0] for height in heights] == [0, step, 2 * step]


def test_text_only_picture_only_and_nothing_at_all() -> None:
    text = draw_sample(_found(sample()))
    missing = draw_sample(_found(sample(image="gone.jpg")))
    assert missing.height > text.height
    shown = draw_sample(_found(_scene([], []), picture(size=(64, 64), colour=200), LABELS))
    assert len(_pixels(shown, (200, 20, 30))) == 512 * 512
    empty = draw_sample(_found({**sample(), "tokens": [], "text": "", "entities": []}))
    assert empty.height < text.height


def test_a_relation() -> None:
    ends = {"head": {"text": "Anna", "span": [0, 1]}, "tail": {"text": "met", "span": [2, 3]}}
    item = {**sample(), "task": "mre", "relation": {**ends, "label": "peer"}}
    labels = {"relations": ["none", "peer"]}
    drawn = draw_sample(_found(item, labels=labels))
    colours = label_colours({**labels, "ends": ["head", "tail"]})
    assert len(set(colours.values())) == 4
    assert all(_pixels(drawn, colours[name]) for name in ("head", "tail", "peer"))
    assert not _pixels(drawn, colours["none"])


def test_a_task_of_the_users_own_shows_all_its_annotations() -> None:
    ends = {"head": {"text": "Anna", "span": [0, 1]}, "tail": {"text": "met", "span": [2, 3]}}
    events = [{"type": "attack", "trigger": {"text": "met", "span": [2, 3]}, "arguments": []}]
    item = {**sample(), "task": "mine", "relation": {**ends, "label": "peer"}, "events": events}
    labels = {"entity_types": ["person"], "relations": ["peer"], "event_types": ["attack"]}
    drawn = draw_sample(_found(item, labels=labels))
    colours = label_colours({**labels, "ends": ["head", "tail"]})
    assert all(_pixels(drawn, colour) for colour in colours.values())
    # Of a task of this package only its own annotation is sound, so nothing else is looked at.
    posts = draw_sample(_found({**item, "task": "mner", "events": [{}]}, labels=labels))
    assert not _pixels(posts, colours["attack"])


def test_any_characters_are_drawn() -> None:
    words = ["שלום", "İzmir", "北京", "😀", "\ud800", "\x1b[31m", "a\nb", "\0", "", "e\u0301" * 40, "한국", "x" * 900]
    item = {**sample(), "tokens": words, "text": " ".join(words)}
    item["entities"] = [{"type": "тип", "span": [0, 5], "text": " ".join(words[:5])}]
    drawn = draw_sample(_found(item))
    assert drawn.width == draw.WIDTH + 2 * draw.MARGIN


def test_what_the_font_cannot_show() -> None:
    assert drawable("Žižkov\n\x1b\ud800", 20) == "Zizkov\ufffd\ufffd\ufffd"
    assert drawable("x" * 20, 20) == "x" * 20
    assert drawable("x" * 21, 20) == "x" * 17 + "..."


def test_a_hostile_sample_is_drawn_in_part() -> None:
    words = ["w" * 3] * 100_000
    entities = [{"type": f"type {number}", "span": [0, 1], "text": "www"} for number in range(5000)]
    drawn = draw_sample(_found({**sample(), "tokens": words, "text": " ".join(words), "entities": entities}))
    assert drawn.height < 20_000
    arguments = [{"role": "agent" * 100, "object": "O1"}] * 5000
    drawn = draw_sample(_found(_scene([[0, 0, 5, 5]] * 5000, arguments), picture(), LABELS))
    assert drawn.height < 20_000


def test_colours_are_apart_and_letters_on_them_can_be_read() -> None:
    def luminance(colour: Colour) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)
        ]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    colours = [_nth_colour(number) for number in range(30)]
    for colour in [*colours, draw.SLATE]:
        light, dark = sorted((luminance(colour), luminance(_ink(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    for number, colour in enumerate(colours):
        for other in colours[:number]:
            assert sum(abs(a - b) for a, b in zip(colour, other, strict=True)) > 30


def test_the_same_sample_gives_the_same_bytes(tmp_path: Path) -> None:
    item = _scene([[1, 1, 9, 9]], [{"role": "agent", "object": "O1"}], "a b")
    for name in ("a.png", "b.png"):
        write_png(draw_sample(_found(item, picture(), LABELS)), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("broken", [b"\x89PNG\r\n\x1a\nnothing", b"GIF89a", b""])
def test_a_picture_that_cannot_be_decoded(broken: bytes) -> None:
    with pytest.raises(UserError, match=r"toy-train-000000\.tar, k: its picture"):
        draw_sample(_found(sample(image="a"), broken))


def test_a_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("1", (300, 300)).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(UserError, match="k: its picture is too large"):
        draw_sample(_found(sample(image="a"), buffer.getvalue()))


def test_the_command_writes_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, out = tmp_path / "shards", tmp_path / "new" / "out.png"
    write_toy(shards)
    argv = ["shards", "inspect", str(shards), "--dataset", "toy", "--png"]
    assert cli.main([*argv, str(out)]) == 0
    assert '"key": "000000_toy"' in capsys.readouterr().out
    with Image.open(out) as drawn:
        assert (drawn.format, drawn.width) == ("PNG", draw.WIDTH + 2 * draw.MARGIN)
    before = out.read_bytes()
    assert cli.main([*argv, str(out), "--sample", "1"]) == 2
    error = capsys.readouterr()
    assert error.err == f"error: {out}: is there already, and is not overwritten. Remove it or choose another name.\n"
    assert error.out == ""
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]
    assert cli.main([*argv, str(out / "below.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_command_names_a_broken_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "shards", SPEC) as writer:
        writer.add("train", "bad", sample(image="a.png"), picture(size=(200, 200))[:200])
    out = tmp_path / "out.png"
    assert cli.main(["shards", "inspect", str(tmp_path / "shards"), "--png", str(out)]) == 2
    assert "error: toy-train-000000.tar, bad: its picture cannot be decoded" in capsys.readouterr().err
    assert not out.exists()
