"""CoNLL BIO files of named entities in tweets with a picture, as UMT publishes Twitter-15 and Twitter-17. A record is

    IMGID:1
    Ann<tab>B-PER
    Lee<tab>I-PER
    <empty line>

The fourth type is OTHER in Twitter-15 and MISC in the others, and miscellaneous in a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    read_lines,
)
from lvlm_clorae.data.shards import DatasetSpec

TYPES = {
    "PER": "person",
    "LOC": "location",
    "ORG": "organization",
    "MISC": "miscellaneous",
    "OTHER": "miscellaneous",
}
FILES = {"train": ("train.txt",), "dev": ("valid.txt", "dev.txt", "val.txt"), "test": ("test.txt",)}


def entity_spec(name: str, reference_f1: float) -> DatasetSpec:
    """What a dataset of such files is."""
    labels = list(dict.fromkeys(TYPES.values()))
    return DatasetSpec(name, "mner", ("entity",), {"entity": labels}, {"entity": reference_f1})


def convert_conll(
    spec: DatasetSpec, published: str, input_dir: Path, images: Path | None, report: BuildReport
) -> Iterator[Converted]:
    """The tweets of train, dev and test in the files' order. Raises UserError for a missing or unreadable file."""
    paths = find_inputs(input_dir, FILES, published)
    pictures = Pictures(images, report)
    for split, path in paths.items():
        for number, (line, rows) in enumerate(_records(path)):
            if report.full(split):
                break
            source = {"file": path.name, "line": line}
            sample = report.attempt(_sample, spec, rows, source, report, place=source, record="\n".join(rows))
            if sample is not None:
                key = make_key(number, sample["image"].rpartition(".")[0])
                yield split, key, sample, pictures.read(sample["image"])


def bio_spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """(published type, start, end) of each entity, as conlleval reads the tags: an I- without an entity of its type
    before it begins one, as after the full stop of ``Dr . Lee`` (O O I-PER). UMT's own scorer does the same.

    Raises ValueError for a tag of another form or of an unknown type.
    """
    spans: list[tuple[str, int, int]] = []
    for position, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if tag == "O":
            continue
        if prefix not in ("B", "I") or kind not in TYPES:
            raise ValueError(f'unknown tag "{tag[:40]}"; known: O, and B- or I- with {", ".join(TYPES)}')
        if prefix == "I" and spans and spans[-1][0] == kind and spans[-1][2] == position:
            spans[-1] = (kind, spans[-1][1], position + 1)
        else:
            spans.append((kind, position, position + 1))
    return spans


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number of the first line, lines) of each record; one ends at an empty line or at the next IMGID."""
    rows: list[str] = []
    start = 0
    for number, line in enumerate([*read_lines(path), ""], 1):
        if rows and (not line.strip() or line.startswith("IMGID:")):
            yield start, rows
            rows = []
        if line.strip():
            start = start if rows else number
            rows.append(line)


def _sample(spec: DatasetSpec, rows: list[str], source: dict[str, Any], report: BuildReport) -> dict[str, Any]:
    head, *body = rows
    if not head.startswith("IMGID:"):
        raise ValueError('the record does not begin with "IMGID:"')
    name = head.removeprefix("IMGID:").strip()
    cells = [row.split("\t") for row in body]
    for offset, row in enumerate(cells, 1):
        if len(row) != 2 or not row[0]:
            raise ValueError(f"line {source['line'] + offset} is not a token, a tab and a tag")
    if not cells:
        raise ValueError("the tweet has no tokens")
    tokens, tags = [row[0] for row in cells], [row[1].strip() for row in cells]
    spans = bio_spans(tags)
    report.notes["entities that begin with an I- tag"] += sum(tags[start].startswith("I") for _, start, _ in spans)
    entities = [{"type": TYPES[kind], **mention(tokens, start, end)} for kind, start, end in spans]
    return make_sample(spec, tokens, {**source, "id": name}, image=picture_name(f"{name}.jpg"), entities=entities)
