"""Reading order, sections, layout and text search of scanned documents."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from lvlm_clorae.data.convert.documents import Block, crop, extent, find_text, layout, rows, sections, spans
from tests.helpers.shards import pil_image


def block(number: int, text: str, x: int, y: int, lines: int = 1) -> Block:
    """A block of 10 pixels a line."""
    return Block(number, text.split(), (x, y, x + 50, y + 10 * lines), (x, y, x + 50, y + 10))


def test_rows_are_read_from_top_to_bottom_and_left_to_right() -> None:
    blocks = [block(1, "d", 200, 40), block(2, "b", 100, 3), block(3, "a", 0, 0, lines=5), block(4, "c", 0, 42)]
    assert [[item.number for item in row] for row in rows(blocks)] == [[3, 2], [4, 1]]


def test_sections_end_at_the_widest_gap_of_their_second_half() -> None:
    tops = [0, 12, 40, 80, 92, 104]
    page = rows([block(number, "a b", 0, top) for number, top in enumerate(tops)])
    assert [[item.number for item in part] for part in sections(page, 8)] == [[0, 1, 2], [3, 4, 5]]
    assert [[item.number for item in part] for part in sections(page, 100)] == [[0, 1, 2, 3, 4, 5]]
    assert [len(part) for part in sections(page, 1)] == [1] * 6, "a row is never cut"


@pytest.mark.parametrize("size", range(1, 30))
def test_sections_keep_every_block_once_and_in_order(size: int) -> None:
    page = rows([block(n, "a " * (n % 5 + 1), 60 * (n % 3), 13 * (n // 3) + n % 2) for n in range(20)])
    found = [item for part in sections(page, size) for item in part]
    assert found == [item for row in page for item in row]
    for part in sections(page, size):
        assert sum(len(item.words) for item in part) <= size or len(rows(part)) == 1


def test_layout_is_in_hundredths_of_the_frame() -> None:
    blocks = [block(7, "Date:", 100, 100), block(8, "5 May", 150, 110)]
    assert extent(blocks) == (100, 100, 200, 120)
    assert spans(blocks) == {7: (0, 1), 8: (1, 3)}
    assert layout(blocks, extent(blocks)) == [
        {"span": [0, 1], "box": [0, 0, 50, 50]},
        {"span": [1, 3], "box": [50, 50, 99, 99]},
    ]
    assert layout(blocks, (120, 0, 120, 0))[0]["box"] == [0, 99, 99, 99]


@pytest.mark.parametrize(
    ("text", "mention", "how"),
    [
        ("NO 5,  Elm Road", {"text": "NO 5, Elm Road", "span": [3, 7]}, "verbatim"),
        ("9.00", {"text": "9.00", "span": [2, 3]}, "verbatim"),
        ("Oak (M) Ltd", {"text": "Oak (M) Ltd", "span": [0, 2], "verbatim": False}, "other punctuation or spaces"),
        ("01/02", {"text": "01/02", "span": [7, 8], "verbatim": False}, "other punctuation or spaces"),
        ("Oak (N) Ltd", {"text": "Oak (N) Ltd", "verbatim": False}, "not in the text"),
        ("--", {"text": "--", "verbatim": False}, "not in the text"),
    ],
)
def test_find_text(text: str, mention: dict[str, object], how: str) -> None:
    tokens = ["OAK(M)", "LTD.", "9.00", "NO", "5,", "Elm", "Road", "Date:01/02", "9.00"]
    found, manner = find_text(tokens, text)
    assert found == mention
    assert manner.endswith(how)


def test_crop() -> None:
    part = crop(pil_image(size=(20, 10)), (4, 2, 30, 5))
    assert part is not None
    assert Image.open(io.BytesIO(part)).size == (16, 4)
    assert crop(None, (0, 0, 1, 1)) is None
    with pytest.raises(ValueError, match="20x10"):
        crop(pil_image(size=(20, 10)), (30, 2, 40, 5))
