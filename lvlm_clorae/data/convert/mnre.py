"""MNRE V1: the relation between two names of a tweet with a picture (METHOD 7).

Published at github.com/thecharm/MNRE, Version-1: ours_train.txt, ours_val.txt, ours_test.txt, a Python literal a line:

    {'token': [...], 'h': {'name': 'Ann Lee', 'pos': [0, 2]}, 't': {...}, 'relation': 'none', 'img_id': '1.jpg'}
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert.common import (
    BuildReport,
    Converted,
    Pictures,
    find_input,
    make_key,
    mention,
    picture_name,
    read_lines,
    squeeze,
    token_list,
)
from lvlm_clorae.data.shards import MAX_JSON_BYTES, DatasetSpec

RELATIONS = [
    "none",
    "/loc/loc/administration_divisions",
    "/loc/loc/capital",
    "/loc/loc/contain",
    "/misc/loc/held_on",
    "/misc/misc/part_of",
    "/org/loc/locate_at",
    "/org/org/alternate_names",
    "/org/org/subsidiary",
    "/per/loc/place_of_birth",
    "/per/loc/place_of_death",
    "/per/loc/place_of_residence",
    "/per/misc/awarded",
    "/per/misc/creat",
    "/per/misc/nationality",
    "/per/misc/present_in",
    "/per/misc/race",
    "/per/misc/religion",
    "/per/org/founder_of",
    "/per/org/leader",
    "/per/org/member_of",
    "/per/per/alternate_names",
    "/per/per/charges",
    "/per/per/classmate",
    "/per/per/colleague",
    "/per/per/couple",
    "/per/per/neighbor",
    "/per/per/parent",
    "/per/per/peer",
    "/per/per/relative",
    "/per/per/siblings",
]
FILES = {"train": ("ours_train.txt",), "dev": ("ours_val.txt",), "test": ("ours_test.txt",)}
PUBLISHED = "github.com/thecharm/MNRE, folder Version-1"

SPEC = DatasetSpec(
    name="mre_v1",
    task="mre",
    subtasks=("relation",),
    labels={"relation": RELATIONS},
    reference_f1={"relation": 81.8},
)


def convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """The records of train, dev and test in the files' order. Raises UserError for a missing or unreadable file."""
    paths = {split: find_input(input_dir, names, PUBLISHED) for split, names in FILES.items()}
    pictures = Pictures(images, report)
    for split, path in paths.items():
        for number, line in enumerate(read_lines(path), 1):
            if report.full(split):
                break
            if not line.strip():
                continue
            source = {"file": path.name, "line": number}
            sample = report.attempt(_sample, line, source, report, place=source, record=line)
            if sample is not None:
                key = make_key(number, sample["image"].rpartition(".")[0])
                yield split, key, sample, pictures.read(sample["image"])


def _sample(line: str, source: dict[str, Any], report: BuildReport) -> dict[str, Any]:
    if len(line) > MAX_JSON_BYTES:
        raise ValueError(f"the line has {len(line)} characters")
    record = ast.literal_eval(line.strip())
    tokens = token_list(record["token"])
    head, tail = (_mention(tokens, record, end, source, report) for end in ("h", "t"))
    return {
        "dataset": SPEC.name,
        "task": SPEC.task,
        "text": " ".join(tokens),
        "tokens": tokens,
        "image": _image(record["img_id"]),
        "objects": [],
        "relation": {"head": head, "tail": tail, "label": record["relation"]},
        "source": source,
    }


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
    places = _places(tokens, squeeze(name))
    if len(places) == 1:
        report.notes["spans that disagree with their name; moved to the name's one place"] += 1
        return mention(tokens, *places[0])
    report.notes["spans that disagree with their name; kept, for the name has no one place"] += 1
    return found


def _places(tokens: list[str], name: str) -> list[tuple[int, int]]:
    """Half-open spans of the token sequences that spell `name`, spaces aside."""
    places = []
    for start, token in enumerate(tokens):
        spelt, end = squeeze(token), start + 1
        while spelt and name.startswith(spelt) and spelt != name and end < len(tokens):
            spelt, end = spelt + squeeze(tokens[end]), end + 1
        if name and spelt == name:
            places.append((start, end))
    return places


def _image(img_id: object) -> str:
    """The picture's file name; where `img_id` is an int (or has no extension), `.jpg` was left away."""
    if type(img_id) is int:
        return f"{img_id}.jpg"
    if not isinstance(img_id, str):
        raise ValueError(f"img_id is neither a string nor an int but a {type(img_id).__name__}")
    return picture_name(img_id if "." in img_id else f"{img_id}.jpg")
