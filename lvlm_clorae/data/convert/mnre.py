"""The lines of MNRE, both versions: a Python literal each, of one pair of names in a tweet with a picture.

    {'token': [...], 'h': {'name': 'Ann Lee', 'pos': [0, 2]}, 't': {...}, 'img_id': '1.jpg', 'relation': 'None'}

No relation is ``none`` in V1 and ``None`` in V2, and ``none`` in a sample.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert.common import (
    BuildReport,
    Converted,
    Pictures,
    find_inputs,
    make_key,
    make_sample,
    mention,
    picture_name,
    places,
    read_lines,
    squeeze,
    token_list,
)
from lvlm_clorae.data.shards import MAX_JSON_BYTES, DatasetSpec
from lvlm_clorae.tasks.schema import NONE


def relation_spec(name: str, relations: list[str], reference_f1: float) -> DatasetSpec:
    """What a dataset of such lines is."""
    return DatasetSpec(name, "mre", ("relation",), {"relation": relations}, {"relation": reference_f1})


def convert_mnre(
    spec: DatasetSpec,
    files: Mapping[str, tuple[str, ...]],
    published: str,
    input_dir: Path,
    images: Path | None,
    report: BuildReport,
) -> Iterator[Converted]:
    """The records of each split in its file's order. Raises UserError for a missing or unreadable file."""
    paths = find_inputs(input_dir, files, published)
    pictures = Pictures(images, report)
    for split, path in paths.items():
        for number, line in enumerate(read_lines(path), 1):
            if report.full(split):
                break
            if not line.strip():
                continue
            source = {"file": path.name, "line": number}
            sample = report.attempt(_sample, spec, line, source, report, place=source, record=line)
            if sample is not None:
                key = make_key(number, sample["image"].rpartition(".")[0])
                yield split, key, sample, pictures.read(sample["image"])


def _sample(spec: DatasetSpec, line: str, source: dict[str, Any], report: BuildReport) -> dict[str, Any]:
    if len(line) > MAX_JSON_BYTES:
        raise ValueError(f"the line has {len(line)} characters")
    record = ast.literal_eval(line.strip())
    tokens = token_list(record["token"])
    head, tail = (_mention(tokens, record, end, source, report) for end in ("h", "t"))
    label = NONE if record["relation"] in ("none", "None") else record["relation"]
    relation = {"head": head, "tail": tail, "label": label}
    return make_sample(spec, tokens, source, image=_image(record["img_id"]), relation=relation)


def _mention(
    tokens: list[str], record: dict[str, Any], end: str, source: dict[str, Any], report: BuildReport
) -> dict[str, Any]:
    """The mention `h` or `t`, spelt as its tokens; where `name` disagrees, the published name goes into `source`.

    A span and a name that differ in spaces only are the same mention (``# Elms`` is published with the name #Elms).
    Where they differ in more, the name's one place among the tokens is taken; without exactly one, the span is kept.
    """
    name, (start, stop) = record[end]["name"], record[end]["pos"]
    found = mention(tokens, start, stop)
    if found["text"] == name:
        return found
    source[f"{end}_name"] = name
    if squeeze(found["text"]) == squeeze(name):
        report.notes["names that differ from their span in spaces only; the span's spelling is used"] += 1
        return found
    source[f"{end}_pos"] = [start, stop]
    spelt = places(tokens, name)
    if len(spelt) == 1:
        report.notes["spans that disagree with their name; moved to the name's one place"] += 1
        return mention(tokens, *spelt[0])
    report.notes["spans that disagree with their name; kept, for the name has no one place"] += 1
    return found


def _image(img_id: object) -> str:
    """The picture's file name; where `img_id` is an int (or has no extension), `.jpg` was left away."""
    if type(img_id) is int:
        return f"{img_id}.jpg"
    if not isinstance(img_id, str):
        raise ValueError(f"img_id is neither a string nor an int but a {type(img_id).__name__}")
    return picture_name(img_id if "." in img_id else f"{img_id}.jpg")
