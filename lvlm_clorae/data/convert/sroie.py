"""SROIE: company, date, address and total of scanned receipts (Huang et al., ICDAR 2019, task 3).

    train/box/X.txt        a line of the receipt a line: x1,y1,x2,y2,x3,y3,x4,y4,text (the corners of its box)
    train/entities/X.txt   {"company": "...", "date": "...", "address": "...", "total": "..."}, also X.json
    train/img/X.jpg        the scan, below --images
    test/                  the same

The gold of a field is the string that is published, which the lines spell differently in about one of twenty (spaces,
punctuation, errors of the OCR): such an entity is not verbatim.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert import common, documents
from lvlm_clorae.data.convert.common import BuildReport, Converted, Converter, Origin, Sample
from lvlm_clorae.data.convert.documents import Block
from lvlm_clorae.data.convert.image_files import ImageFiles
from lvlm_clorae.data.index import DatasetSpec
from lvlm_clorae.errors import UserError

FIELDS = ["company", "date", "address", "total"]
FOLDERS = {"train": "train/box", "test": "test/box"}
PUBLISHED = "rrc.cvc.uab.es/?ch=13, task 3"
SPEC = DatasetSpec("sroie", documents.TASK, ("entity",), {"entity": FIELDS}, {})


def _convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    image_files = ImageFiles(images, report.unusable)
    for split, number, path in documents.page_files(input_dir, FOLDERS, "*.txt", PUBLISHED):
        if report.full(split):
            continue
        sample = report.attempt(partial(_sample, report), path, documents.origin(path, number))
        if sample is not None:
            yield split, common.make_key(number, path.stem), sample, image_files.read(sample["image"])


def _sample(report: BuildReport, path: Path, origin: Origin) -> Sample:
    blocks = [block for row in documents.rows(_blocks(path)) for block in row]
    tokens = [word for block in blocks for word in block.words]
    fields, entities = _fields(path), []
    for name in FIELDS:
        if not str(fields.get(name, "")).strip():
            report.notes[f"receipts without a published {name}"] += 1
            continue
        mention, how = documents.find_text(tokens, fields[name])
        if how != "verbatim":
            report.notes[f"{name}: published text is {how}"] += 1
        entities.append({"type": name, **mention})
    boxes = documents.layout(blocks, documents.extent(blocks))
    image = common.image_name(f"{path.stem}.jpg")
    return common.make_sample(SPEC, tokens, origin, image=image, entities=entities, layout=boxes)


def _blocks(path: Path) -> list[Block]:
    found = []
    for number, line in enumerate(common.read_lines(path), 1):
        *corners, text = line.split(",", 8)
        if text.split():
            if len(corners) != 8:
                raise ValueError(f"line {number} of {path.name} is not eight coordinates and a text")
            x, y = sorted(map(int, corners[::2])), sorted(map(int, corners[1::2]))
            box = x[0], y[0], x[-1], y[-1]
            found.append(Block(number, text.split(), box, box))
    if not found:
        raise ValueError(f"{path.name} has no lines")
    return found


def _fields(path: Path) -> dict[str, Any]:
    names = (f"{path.stem}.txt", f"{path.stem}.json")
    try:
        found = common.find_input(path.parent.parent / "entities", names, PUBLISHED)
        return common.parse_json(common.read_bounded(found), found.name, dict)
    except UserError as error:  # of one receipt, which is rejected
        raise ValueError(str(error)) from None


CONVERTER = Converter(SPEC, _convert)
