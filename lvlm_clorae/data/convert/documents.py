"""Shared parts of the converters of scanned documents: reading order, layout, sections of a page, and files.

The text of a page is its blocks (lines of a receipt, fields of a form) in reading order, and its layout the box of each
block, in hundredths of the region that the text is from. Both follow from the published boxes alone, so they are the
same with and without the image.
"""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert import common
from lvlm_clorae.data.convert.common import Origin, RawBox
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks.schema import LAYOUT_SIZE

TASK = "document"
"""The task, and so the expert, of all scanned documents."""


@dataclass(frozen=True)
class Block:
    """Words that belong together, in order; `number` is the publisher's id or the line, boxes are x1, y1, x2, y2."""

    number: int
    words: list[str]
    box: RawBox
    first_line: RawBox
    """The box of its first line, by which it is ordered."""


def page_files(
    input_dir: Path, folders: Mapping[str, str], pattern: str, published: str
) -> Iterator[tuple[str, int, Path]]:
    """Yield (split, number from 1, annotation file) of the published folders; a tenth of train becomes dev, by name.

    Raises UserError, with the place of publication, for a folder that is missing or has no such files.
    """
    for published_split, folder in folders.items():
        paths = sorted((input_dir / folder).glob(pattern))
        if not paths:
            raise UserError(f"{input_dir}: contains no {folder}/{pattern}. It is published at {published}.")
        for number, path in enumerate(paths, 1):
            yield common.hashed_split(path.stem) if published_split == "train" else published_split, number, path


def rows(blocks: Iterable[Block]) -> list[list[Block]]:
    """Group blocks to rows from top to bottom, each from left to right.

    A block is in the current row if the middle of its first line is above the lower edge of that of the row's first
    block.
    """
    found: list[list[Block]] = []
    for block in sorted(blocks, key=lambda block: (_middle(block), block.box[0], block.number)):
        if found and _middle(block) < found[-1][0].first_line[3]:
            found[-1].append(block)
        else:
            found.append([block])
    return [sorted(row, key=lambda block: (block.box[0], block.number)) for row in found]


def _middle(block: Block) -> float:
    return float(block.first_line[1] + block.first_line[3]) / 2


def sections(page: Sequence[list[Block]], max_words: int) -> Iterator[list[Block]]:
    """Cut the rows of a page into sections of at most `max_words` words, or of a single row that has more.

    Each section ends at the widest vertical gap of its second half. Annotations are not read: a section that kept
    linked blocks together would reveal the links.
    """
    rest = list(page)
    while rest:
        end, cuts = 0, []
        while end < len(rest) and (end == 0 or _words(rest[: end + 1]) <= max_words):
            end += 1
            if end < len(rest) and 2 * _words(rest[:end]) >= max_words:
                gap = min(block.box[1] for block in rest[end]) - max(b.box[3] for row in rest[:end] for b in row)
                cuts.append((gap, end))
        if end < len(rest) and cuts:
            end = max(cuts)[1]
        yield [block for row in rest[:end] for block in row]
        del rest[:end]


def _words(page: Sequence[list[Block]]) -> int:
    return sum(len(block.words) for row in page for block in row)


def extent(blocks: Sequence[Block]) -> RawBox:
    """Return the smallest box around the blocks."""
    boxes = [block.box for block in blocks]
    return (
        *(min(box[edge] for box in boxes) for edge in (0, 1)),
        *(max(box[edge] for box in boxes) for edge in (2, 3)),
    )


def spans(blocks: Sequence[Block]) -> dict[int, tuple[int, int]]:
    """Return the half-open token span of each block, by its number, in the text of the blocks."""
    found, end = {}, 0
    for block in blocks:
        found[block.number] = end, (end := end + len(block.words))
    return found


def layout(blocks: Sequence[Block], frame: RawBox) -> list[dict[str, Any]]:
    """Return the layout of the text of the blocks: span, and box in hundredths of the frame."""
    left, top, right, bottom = frame
    width, height = max(right - left, 1), max(bottom - top, 1)

    def scaled(edge: float, start: float, size: float) -> int:
        return min(max(int(LAYOUT_SIZE * (edge - start) / size), 0), LAYOUT_SIZE - 1)

    return [
        {
            "span": list(span),
            "box": [scaled(edge, *((top, height) if n % 2 else (left, width))) for n, edge in enumerate(block.box)],
        }
        for block, span in zip(blocks, spans(blocks).values(), strict=True)
    ]


def crop(image: bytes | None, frame: RawBox) -> bytes | None:
    """Return the part of a page's image in the frame as PNG; None without one."""
    if image is None:
        return None
    from PIL import Image

    page = Image.open(io.BytesIO(image))
    left, top, right, bottom = frame
    region = max(0, int(left)), max(0, int(top)), min(page.width, int(right) + 1), min(page.height, int(bottom) + 1)
    if not (region[0] < region[2] and region[1] < region[3]):
        raise ValueError(f"the blocks {list(frame)} are outside the image of {page.width}x{page.height} pixels")
    buffer = io.BytesIO()
    page.crop(region).save(buffer, "PNG")
    return buffer.getvalue()


def find_text(tokens: list[str], text: str) -> tuple[dict[str, Any], str]:
    """Return (mention of a published text, how it was found).

    The first occurrence as whole tokens, else the tokens that contain it when letter case, punctuation and spaces are
    ignored (not verbatim), else none (not verbatim, without a span).
    """
    words = text.split()
    text = " ".join(words)
    for start in range(len(tokens) - len(words) + 1):
        if tokens[start : start + len(words)] == words:
            return common.mention(tokens, start, start + len(words)), "verbatim"
    mention = {"text": text, "verbatim": False}
    owners = [number for number, token in enumerate(tokens) for _ in _letters(token)]
    position = "".join(map(_letters, tokens)).find(_letters(text))
    if position < 0 or not _letters(text):
        return mention, "not in the text"
    last = position + len(_letters(text)) - 1
    return {**mention, "span": [owners[position], owners[last] + 1]}, "in the text with other punctuation or spaces"


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).casefold()


def origin(path: Path, number: int) -> Origin:
    """Return the source of a page."""
    return {"file": path.name, "line": number}
