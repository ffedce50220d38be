"""Twitter-15, Twitter-17 and SNAP: named entities in tweets with an image, in CoNLL BIO files. A record is

    IMGID:1
    Ann<tab>B-PER
    Lee<tab>I-PER
    <empty line>

UMT publishes the first two in these files. The authors of SNAP provide it on request, in the files that RpBERT reads.
The fourth type is OTHER in Twitter-15 and MISC in the others, and miscellaneous in a sample.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lvlm_clorae.data.convert import common
from lvlm_clorae.data.convert.common import BuildReport, Converted, Converter, Origin, Sample
from lvlm_clorae.data.index import DatasetSpec

TYPES = {"PER": "person", "LOC": "location", "ORG": "organization", "MISC": "miscellaneous", "OTHER": "miscellaneous"}
FILES = {"train": ("train.txt",), "dev": ("valid.txt", "dev.txt", "val.txt"), "test": ("test.txt",)}
PUBLISHED = {
    "twitter15": "github.com/jefferyYu/UMT, folder data/twitter2015",
    "twitter17": "github.com/jefferyYu/UMT, folder data/twitter2017",
    "snap": "its authors (Lu et al., ACL 2018, aclanthology.org/P18-1185), on request",
}


def bio_spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return (published type, start, end) of each entity, as conlleval and UMT's scorer read the tags.

    An I- tag that does not continue an entity of its type begins one, as after the full stop of ``Dr . Lee``
    (O O I-PER). Raises ValueError for a tag of another form or of an unknown type.
    """
    spans: list[tuple[str, int, int]] = []
    for position, tag in enumerate(tags):
        prefix, _, entity_type = tag.partition("-")
        if tag == "O":
            continue
        if prefix not in ("B", "I") or entity_type not in TYPES:
            raise ValueError(f'unknown tag "{tag[:40]}"; known: O, and B- or I- with {", ".join(TYPES)}')
        if prefix == "I" and spans and spans[-1][0] == entity_type and spans[-1][2] == position:
            spans[-1] = (entity_type, spans[-1][1], position + 1)
        else:
            spans.append((entity_type, position, position + 1))
    return spans


def _convert(spec: DatasetSpec, input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    paths = common.find_inputs(input_dir, FILES, PUBLISHED[spec.name])
    return common.convert_splits(paths, _records, partial(_sample, spec, report), images, report)


def _records(path: Path) -> Iterator[common.Numbered]:
    """Yield the records, numbered from 0, with their first line; one ends at an empty line or at the next IMGID."""
    rows: list[str] = []
    number = 0
    for position, line in enumerate([*common.read_lines(path), ""], 1):
        if rows and (not line.strip() or line.startswith("IMGID:")):
            yield number, position - len(rows), "\n".join(rows)
            rows, number = [], number + 1
        if line.strip():
            rows.append(line)


def _sample(spec: DatasetSpec, report: BuildReport, record: str, origin: Origin) -> Sample:
    head, *body = record.split("\n")
    if not head.startswith("IMGID:"):
        raise ValueError('the record does not begin with "IMGID:"')
    name = head.removeprefix("IMGID:").strip()
    cells = [row.split("\t") for row in body]
    for offset, row in enumerate(cells, 1):
        if len(row) != 2 or not row[0]:
            raise ValueError(f"line {origin['line'] + offset} is not a token, a tab and a tag")
    if not cells:
        raise ValueError("the tweet has no tokens")
    tokens, tags = [row[0] for row in cells], [row[1].strip() for row in cells]
    spans = bio_spans(tags)
    report.notes["entities that begin with an I- tag"] += sum(tags[start].startswith("I") for _, start, _ in spans)
    entities = [{"type": TYPES[entity_type], **common.mention(tokens, start, end)} for entity_type, start, end in spans]
    image = common.image_name(f"{name}.jpg")
    return common.make_sample(spec, tokens, {**origin, "id": name}, image=image, entities=entities)


_SPECS = map(common.published_spec, PUBLISHED)
CONVERTERS = {spec.name: Converter(spec, partial(_convert, spec)) for spec in _SPECS}
