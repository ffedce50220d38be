"""Rendered samples: positions of boxes and spans, arbitrary samples, and files that are never overwritten."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lvlm_clorae import cli
from lvlm_clorae.data import render
from lvlm_clorae.data.inspect import FoundSample
from lvlm_clorae.data.render import Colour, label_colours, render_sample, renderable, text_colour, write_png
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.errors import UserError
from tests.helpers.shards import SPEC, pil_image, sample, write_toy

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


def _boxes(figure: Figure) -> dict[tuple[float, ...], Any]:
    """Return the colour of each box by its corners in points."""
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    return {tuple(round(float(value), 6) for value in box.get_bbox().extents): box.get_edgecolor()[:3] for box in boxes}


def _texts(figure: Figure) -> list[str]:
    return [text.get_text().strip() for text in figure.axes[0].texts]


def _bars(figure: Figure, colour: Colour, height: float = render.BAR) -> list[tuple[float, ...]]:
    """Return (x1, y1, x2, y2) of the filled rectangles of a colour and height, in points."""
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and patch.get_fill()]
    return [
        tuple(patch.get_bbox().extents)
        for patch in patches
        if patch.get_facecolor()[:3] == colour and patch.get_height() == height
    ]


def _pixels(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _position(x: float, y: float) -> tuple[int, int]:
    """Return the pixel at a position in points."""
    return int(2 * (render.MARGIN + x)), int(2 * (render.MARGIN + y))


def _extent(figure: Figure) -> tuple[float, ...]:
    """Return (left, right, bottom, top) of the image in points."""
    (image,) = figure.axes[0].images
    return tuple(image.get_extent())


@pytest.mark.parametrize(
    ("size", "scale"),
    [((64, 64), 8), ((300, 100), 1), ((256, 16), 2), ((800, 600), 1), ((1600, 400), 0.5), ((4, 1), 128)],
)
def test_image_is_scaled(size: tuple[int, int], scale: float) -> None:
    figure = render_sample(_found({**sample(image="a"), "entities": []}, pil_image(size=size, colour=200)))
    left, right, bottom, top = _extent(figure)
    assert (left, right, bottom - top) == (0, size[0] * scale, size[1] * scale)
    pixels = _pixels(figure)
    for x, y in ((left + 2, top + 0.5), ((left + right) / 2, (top + bottom) / 2), (right - 2, bottom - 0.5)):
        assert pixels.getpixel(_position(x, y)) == (200, 20, 30)
    assert pixels.getpixel(_position(right + 2, top)) == (255, 255, 255)


def test_box_edges_have_the_colour_of_their_role() -> None:
    boxes = [[8, 16, 40, 30], [5, 40, 20, 60], [50, 34, 60, 60]]
    arguments = [{"role": "agent", "object": "O1"}, {"role": "place", "object": "O2"}]
    figure = render_sample(_found(_scene(boxes, arguments), pil_image(size=(64, 64), colour=200), LABELS))
    left, _, _, top = _extent(figure)
    pixels = _pixels(figure)
    for box, colour in zip(boxes, (COLOURS["agent"], COLOURS["place"], render.SLATE), strict=True):
        x1, y1, x2, y2 = (8 * value + edge for value, edge in zip(box, (left, top, left, top), strict=True))
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
        expected = tuple(round(value * 255) for value in colour)
        for x, y in ((x1, middle[1]), (x2, middle[1]), (middle[0], y1), (middle[0], y2), (x2, y2)):
            assert pixels.getpixel(_position(x, y)) == pytest.approx(expected, abs=1), (box, x, y)
        assert pixels.getpixel(_position(*middle)) == (200, 20, 30)
        assert pixels.getpixel(_position(x2 + 2, middle[1])) == (255, 255, 255)
    assert COLOURS["agent"] != COLOURS["place"]
    assert {"O1 agent", "O2 place", "O3"} <= set(_texts(figure))


def test_boxes_outside_the_image_are_clipped() -> None:
    boxes: list[list[float]] = [[-(10**400), -5, 10**400, 50], [900, 900, 1e300, 1e300]]
    item = _scene(boxes, [{"role": "agent", "object": "O1"}])
    figure = render_sample(_found(item, pil_image(size=(64, 64), colour=200), LABELS))
    left, right, bottom, top = _extent(figure)
    assert _boxes(figure) == {
        (left, top, right, top + 50 * 8): COLOURS["agent"],
        (right, bottom, right, bottom): render.SLATE,
    }


def test_tags_do_not_overlap() -> None:
    figure = render_sample(_found(_scene([[10, 30, 60, 60]] * 20, []), pil_image(size=(64, 64)), LABELS))
    left, right, bottom, top = _extent(figure)
    tags = _bars(figure, render.SLATE, render.ROW)[:20]
    assert len(tags) == 20
    for number, (x1, y1, x2, y2) in enumerate(tags):
        assert left <= x1 < x2 <= right
        assert top - render.ROW <= y1 < y2 <= bottom + render.ROW
        assert not any(x1 < c and a < x2 and y1 < d and b < y2 for a, b, c, d in tags[:number])


def test_spans_have_the_colours_of_their_labels() -> None:
    labels = {"entity_types": ["person", "location"]}
    colours = label_colours(labels)
    item = sample()
    item["entities"].append({"type": "location", "span": [3, 4], "text": "0"})
    figure = render_sample(_found(item, labels=labels))
    tokens = item["tokens"]
    for name, (first, stop) in (("person", item["entities"][0]["span"]), ("location", (3, 4))):
        ((left, _, right, _),) = _bars(figure, colours[name])
        assert left == render.CHAR * len(" ".join([*tokens[:first], ""]))
        assert right - left == render.CHAR * len(" ".join(tokens[first:stop]))
    assert {"person", "location", *item["tokens"]} <= set(_texts(figure))


def test_span_over_several_lines_is_marked_in_each() -> None:
    tokens = ["word"] * 50
    item = {**sample(), "tokens": tokens, "text": " ".join(tokens)}
    item["entities"] = [{"type": "person", "span": [0, 50], "text": item["text"]}]
    bars = _bars(render_sample(_found(item)), label_colours({"": ["person"]})["person"])
    assert [x2 - x1 for x1, _, x2, _ in bars] == [render.CHAR * (5 * words - 1) for words in (20, 20, 10)]
    assert len({y1 for _, y1, _, _ in bars}) == 3


def test_nested_spans_have_separate_rows() -> None:
    tokens = ["University", "of", "Tamsk"]
    item = {**sample(), "tokens": tokens, "text": " ".join(tokens)}
    spans = ([0, 3], [2, 3], [1, 3])
    item["entities"] = [{"type": "person", "span": span, "text": " ".join(tokens[slice(*span)])} for span in spans]
    bars = _bars(render_sample(_found(item)), label_colours({"": ["person"]})["person"])
    assert [x1 / render.CHAR for x1, _, _, _ in bars] == [0, 11, 14]
    assert [y1 - bars[0][1] for _, y1, _, _ in bars] == [0, 24, 48]


def test_samples_without_image_or_text() -> None:
    assert not render_sample(_found(sample())).axes[0].images
    assert "gone.jpg" in _texts(render_sample(_found(sample(image="gone.jpg"))))
    shown = render_sample(_found(_scene([], []), pil_image(size=(64, 64), colour=200), LABELS))
    assert _extent(shown)[1] == 512
    empty = render_sample(_found({**sample(), "tokens": [], "text": "", "entities": []}))
    assert _texts(empty)[-2:] == ["no", "entities"]


def test_relation() -> None:
    ends = {"head": {"text": "Anna", "span": [0, 1]}, "tail": {"text": "met", "span": [2, 3]}}
    item = {**sample(), "task": "mre", "relation": {**ends, "label": "peer"}}
    labels = {"relations": ["none", "peer"]}
    figure = render_sample(_found(item, labels=labels))
    colours = label_colours({**labels, "ends": ["head", "tail"]})
    assert len(set(colours.values())) == 4
    assert all(_bars(figure, colours[name], render.ROW) for name in ("head", "tail", "peer"))
    assert _texts(figure)[-5:] == ["head", "Anna", "tail", "met", "peer"]
    assert "none" not in _texts(figure)


def test_user_defined_task_shows_all_annotations() -> None:
    ends = {"head": {"text": "Anna", "span": [0, 1]}, "tail": {"text": "met", "span": [2, 3]}}
    events = [{"type": "attack", "trigger": {"text": "met", "span": [2, 3]}, "arguments": []}]
    item = {**sample(), "task": "mine", "relation": {**ends, "label": "peer"}, "events": events}
    labels = {"entity_types": ["person"], "relations": ["peer"], "event_types": ["attack"]}
    assert {"person", "peer", "head", "tail", "attack"} <= set(_texts(render_sample(_found(item, labels=labels))))
    # For a task of this package only its own annotation is valid, so others are not rendered.
    posts = render_sample(_found({**item, "task": "mner", "events": [{}]}, labels=labels))
    assert "attack" not in _texts(posts)


def test_labels_of_several_events_are_numbered() -> None:
    item = _scene([[0, 0, 5, 5]], [{"role": "agent", "object": "O1"}])
    item["events"].append({"type": "meet", "trigger": None, "arguments": []})
    texts = _texts(render_sample(_found(item, pil_image(), LABELS)))
    assert {"O1 agent (1)", "attack (1)", "meet (2)"} <= set(texts)


@pytest.mark.filterwarnings("error")
def test_arbitrary_characters(tmp_path: Path) -> None:
    words = ["שלום", "İzmir", "北京", "😀", "\ud800", "\x1b[31m", "a\nb", "\0", "", "e\u0301" * 40, "$x$", "x" * 900]
    item = {**sample(), "tokens": words, "text": " ".join(words)}
    item["entities"] = [{"type": "тип", "span": [0, 5], "text": " ".join(words[:5])}]
    figure = render_sample(_found(item))
    write_png(figure, tmp_path / "a.png")
    assert {"שלום", "İzmir", "北京", "😀", "\ufffd", "\ufffd[31m", "a\ufffdb", "é" * 40, "$x$", "тип"} <= set(
        _texts(figure)
    )


def test_wide_characters_take_two_cells() -> None:
    item = {**sample(), "tokens": ["北京", "a"], "text": "北京 a"}
    item["entities"] = [{"type": "person", "span": [1, 2], "text": "a"}]
    ((left, _, right, _),) = _bars(render_sample(_found(item)), label_colours({"": ["person"]})["person"])
    assert (left, right) == (5 * render.CHAR, 6 * render.CHAR)


def test_renderable_text() -> None:
    assert renderable("Z\u030cizkov\n\x1b\ud800x\u0336", 20) == "Žizkov\ufffd\ufffd\ufffdx"
    assert renderable("x" * 20, 20) == "x" * 20
    assert renderable("x" * 21, 20) == "x" * 17 + "..."


def test_very_large_sample_is_truncated() -> None:
    words = ["w" * 3] * 100_000
    entities = [{"type": f"type {number}", "span": [0, 1], "text": "www"} for number in range(5000)]
    figure = render_sample(_found({**sample(), "tokens": words, "text": " ".join(words), "entities": entities}))
    assert figure.get_figheight() * figure.dpi < 20_000
    text = " ".join(_texts(figure))
    assert "1000 of 100000 tokens" in text
    assert "200 of 5000 annotations" in text
    arguments = [{"role": "agent" * 100, "object": "O1"}] * 5000
    figure = render_sample(_found(_scene([[0, 0, 5, 5]] * 5000, arguments), pil_image(), LABELS))
    assert figure.get_figheight() * figure.dpi < 20_000
    assert "100 of 5000 objects" in " ".join(_texts(figure))


def test_colours_are_distinct_with_readable_text() -> None:
    def luminance(colour: Colour) -> float:
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    colours = list(label_colours({"": map(str, range(30))}).values())
    for colour in [*colours, render.SLATE]:
        text = {"black": 0.0, "white": 1.0}[text_colour(colour)]
        light, dark = sorted((luminance(colour), text), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    for number, colour in enumerate(colours):
        for other in colours[:number]:
            assert sum(abs(a - b) for a, b in zip(colour, other, strict=True)) > 0.12


def test_rendering_is_deterministic(tmp_path: Path) -> None:
    item = _scene([[1, 1, 9, 9]], [{"role": "agent", "object": "O1"}], "a b")
    for name in ("a.png", "b.png"):
        write_png(render_sample(_found(item, pil_image(), LABELS)), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("broken", [b"\x89PNG\r\n\x1a\nnothing", b"GIF89a", b""])
def test_undecodable_image_raises(broken: bytes) -> None:
    with pytest.raises(UserError, match=r"toy-train-000000\.tar, k"):
        render_sample(_found(sample(image="a"), broken))


def test_decompression_bomb_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("1", (300, 300)).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(UserError, match="too large"):
        render_sample(_found(sample(image="a"), buffer.getvalue()))


def test_command_writes_the_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, out = tmp_path / "shards", tmp_path / "new" / "out.png"
    write_toy(shards)
    argv = ["shards", "inspect", str(shards), "--dataset", "toy", "--png"]
    assert cli.main([*argv, str(out)]) == 0
    printed = capsys.readouterr()
    assert '"key": "000000_toy"' in printed.out
    assert str(out) in printed.err
    with Image.open(out) as rendered:
        assert (rendered.format, rendered.width) == ("PNG", 2 * (render.WIDTH + 2 * render.MARGIN))
    before = out.read_bytes()
    assert cli.main([*argv, str(out), "--sample", "1"]) == 2
    error = capsys.readouterr()
    assert str(out) in error.err
    assert error.out == ""
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]
    assert cli.main([*argv, str(out / "below.png")]) == 2
    assert "below.png" in capsys.readouterr().err


def test_command_names_an_undecodable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "shards", SPEC) as writer:
        writer.add("train", "bad", sample(image="a.png"), pil_image(size=(200, 200))[:200])
    out = tmp_path / "out.png"
    assert cli.main(["shards", "inspect", str(tmp_path / "shards"), "--png", str(out)]) == 2
    assert "toy-train-000000.tar, bad" in capsys.readouterr().err
    assert not out.exists()
