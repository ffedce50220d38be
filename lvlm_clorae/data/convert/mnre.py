"""MNRE V1 and V2: the relation between two names of a tweet with an image. A line is a Python literal:

    {'token': [...], 'h': {'name': 'Ann Lee', 'pos': [0, 2]}, 't': {...}, 'img_id': '1.jpg', 'relation': 'None'}

V2 refines and extends V1 and merges its relations to 23. No relation is ``none`` in V1 and ``None`` in V2, and ``none``
in a sample. MKGFormer and HVPNeT publish V2 with the file names of V1; V1 given as V2 is rejected by its labels.
"""

import ast
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert import common
from lvlm_clorae.data.convert.common import BuildReport, Converted, Converter, Origin, Sample
from lvlm_clorae.data.index import DatasetSpec
from lvlm_clorae.data.reader import MAX_JSON_BYTES
from lvlm_clorae.tasks.schema import NONE

_V1_FILES: common.Files = {"train": ("ours_train.txt",), "dev": ("ours_val.txt",), "test": ("ours_test.txt",)}
_V2_FILES: common.Files = {
    "train": ("mnre_train.txt", "ours_train.txt"),
    "dev": ("mnre_val .txt", "mnre_val.txt", "ours_val.txt"),  # published with the space
    "test": ("mnre_test.txt", "ours_test.txt"),
}


def _convert(
    spec: DatasetSpec, files: common.Files, published: str, input_dir: Path, images: Path | None, report: BuildReport
) -> Iterator[Converted]:
    paths = common.find_inputs(input_dir, files, published)
    return common.convert_splits(paths, common.numbered_lines, partial(_sample, spec, report), images, report)


def _sample(spec: DatasetSpec, report: BuildReport, line: str, origin: Origin) -> Sample:
    if len(line) > MAX_JSON_BYTES:
        raise ValueError(f"the line has {len(line)} characters")
    record = ast.literal_eval(line.strip())
    tokens, source = common.token_list(record["token"]), dict(origin)
    head, tail = (_mention(tokens, record, end, source, report) for end in ("h", "t"))
    label = NONE if record["relation"] in ("none", "None") else record["relation"]
    relation = {"head": head, "tail": tail, "label": label}
    return common.make_sample(spec, tokens, source, image=_image(record["img_id"]), relation=relation)


def _mention(
    tokens: list[str], record: dict[str, Any], end: str, source: Origin, report: BuildReport
) -> dict[str, Any]:
    """Return the mention `h` or `t`; if its published name differs from its tokens, the name is kept in `source`.

    If they differ in more than spaces (``# Elms`` is published as #Elms), the name's only occurrence replaces the span.
    """
    name, (start, stop) = record[end]["name"], record[end]["pos"]
    found = common.mention(tokens, start, stop)
    if found["text"] == name:
        return found
    source[f"{end}_name"] = name
    if common.without_spaces(found["text"]) == common.without_spaces(name):
        report.notes["names that differ from their span in spaces only; the span is kept"] += 1
        return found
    source[f"{end}_pos"] = [start, stop]
    spans = common.find_spans(tokens, name)
    if len(spans) == 1:
        report.notes["spans that disagree with their name; replaced by the name's only occurrence"] += 1
        return common.mention(tokens, *spans[0])
    report.notes["spans that disagree with their name; kept, because the name does not occur exactly once"] += 1
    return found


def _image(img_id: object) -> str:
    """Return the image's file name; ``.jpg`` is added to an int and to a name without an extension."""
    if type(img_id) is int:
        return f"{img_id}.jpg"
    if not isinstance(img_id, str):
        raise ValueError(f"img_id is neither a string nor an int but a {type(img_id).__name__}")
    return common.image_name(img_id if "." in img_id else f"{img_id}.jpg")


def _converter(name: str, files: common.Files, folder: str) -> Converter:
    spec = common.published_spec(name)
    return Converter(spec, partial(_convert, spec, files, f"github.com/thecharm/MNRE, folder {folder}"))


CONVERTERS = {
    "mre_v1": _converter("mre_v1", _V1_FILES, "Version-1"),
    "mre_v2": _converter("mre_v2", _V2_FILES, "mnre_txt"),
}
