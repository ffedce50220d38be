"""M2E2: events and their arguments in news sentences and pictures (METHOD 7; Li et al., ACL 2020).

Published at github.com/limanling/m2e2, data/m2e2_annotations.zip; files may lie beside the zip or only in it.

- test: the 309 sentence-picture pairs of crossmedia_coref.txt, with text_multimedia_event.json and
  image_multimedia_event.json. The event of the picture gives its boxes to the sentence's event of the same type; where
  the types differ (2 pairs) the picture's is an event of its own, without a trigger.
- train and dev: text_only_event.json, sentences without events included, and image_only_event.json, less every
  sentence and picture of the pairs. Sentences and pictures of one article go to the same side, about a tenth to dev.

A box is ``[flag, x1, y1, x2, y2]`` in pixels. Flag "0" marks one box around a crowd; such boxes are objects like the
others, listed in ``source["crowds"]``.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert.common import (
    MAX_INPUT_BYTES,
    BuildReport,
    Converted,
    Pictures,
    Place,
    find_input,
    make_key,
    make_sample,
    number_boxes,
    parse_json,
    picture_name,
    read_bounded,
)
from lvlm_clorae.data.convert.events import M2E2_ROLES, M2E2_TYPES, event_spec, jmee_events
from lvlm_clorae.errors import UserError

ARCHIVE = "m2e2_annotations.zip"
PAIRS, PAIR_TEXTS, PAIR_IMAGES = "crossmedia_coref.txt", "text_multimedia_event.json", "image_multimedia_event.json"
TEXTS, IMAGES = "text_only_event.json", "image_only_event.json"
PUBLISHED = f"github.com/limanling/m2e2, data/{ARCHIVE}"

SPEC = event_spec("m2e2", M2E2_TYPES, M2E2_ROLES)


def convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """The pairs (test), then the sentences and the pictures (train and dev), each in its file's order.

    Raises UserError for a file that is neither in `input_dir` nor in the zip, too large, or not of the published form.
    """
    pair_texts = parse_json(_read(input_dir, PAIR_TEXTS), PAIR_TEXTS, list)
    pair_images = parse_json(_read(input_dir, PAIR_IMAGES), PAIR_IMAGES, dict)
    pairs = _read(input_dir, PAIRS).decode("utf-8", "replace").splitlines()
    texts = parse_json(_read(input_dir, TEXTS), TEXTS, list)
    pictures_only = parse_json(_read(input_dir, IMAGES), IMAGES, dict)
    pictures = Pictures(images, report)

    by_id = {record["sentence_id"]: record for record in pair_texts if _is_sentence(record)}
    for number, line in enumerate(pairs, 1):
        if report.full("test"):
            break
        if not line.strip():
            continue
        place = {"file": PAIRS, "line": number}
        sample = report.attempt(_pair, line, place, by_id, pair_images, report, place=place, record=line)
        if sample is not None:
            key = make_key(number, f"{sample['source']['sentence']}-{sample['image'].removesuffix('.jpg')}")
            yield "test", key, sample, pictures.read(sample["image"])

    paired_words = {" ".join(map(str, record["words"])) for record in by_id.values()}
    article_of: dict[str, str] = {}
    for number, record in enumerate(texts, 1):
        place = {"file": TEXTS, "line": number}
        sample = report.attempt(_text_sample, record, place, report, place=place, record=record)
        if sample is None:
            continue
        sentence = sample["source"]["sentence"]
        if sentence in by_id or sample["text"] in paired_words:
            report.notes["sentences left out, for they occur among the pairs"] += 1
            continue
        # A sentence that several articles repeat must not be trained on and then asked again in dev.
        split = _split(article_of.setdefault(sample["text"], _article(sentence)))
        if not report.full(split):
            yield split, make_key(number, sentence), sample, None

    for number, (name, record) in enumerate(pictures_only.items(), 1):
        if name in pair_images:
            report.notes["pictures left out, for they occur among the pairs"] += 1
            continue
        split = _split(_article(name))
        if report.full(split):
            continue
        place = {"file": IMAGES, "line": number}
        sample = report.attempt(_image_sample, name, record, place, place=place, record=record)
        if sample is not None:
            yield split, make_key(number, f"image-{name}"), sample, pictures.read(sample["image"])


Texts = dict[str, dict[str, Any]]


def _read(input_dir: Path, name: str) -> bytes:
    """The file beside the archive, else inside it. Raises UserError where it is in neither, or too large."""
    path = find_input(input_dir, (name, ARCHIVE), PUBLISHED)
    if path.name == name:
        return read_bounded(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                # The published zip also holds __MACOSX/._ shadows; a zip's own member size bounds what is unpacked.
                if member.filename.rpartition("/")[2] == name and not member.filename.startswith("__MACOSX"):
                    if member.file_size > MAX_INPUT_BYTES:
                        raise UserError(f"{path}: {name} in it would unpack to {member.file_size} bytes.")
                    return archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}). Download it again from {PUBLISHED}.") from None
    raise UserError(f"{input_dir}: no {name} in it, nor in {ARCHIVE}. It is published at {PUBLISHED}.")


def _pair(line: str, place: Place, texts: Texts, images: dict[str, Any], report: BuildReport) -> dict[str, Any]:
    sentence, picture, kind = line.split("\t")
    name = picture.removesuffix(".jpg")
    if sentence not in texts or name not in images:
        raise ValueError(f"{sentence} is not in {PAIR_TEXTS}, or {picture} not in {PAIR_IMAGES}")
    sample = _text_sample(texts[sentence], place, report)
    seen = _image_sample(name, images[name], place)
    (event,) = seen["events"]
    same = [own for own in sample["events"] if own["type"] == event["type"] == kind]
    if same:
        same[0]["arguments"] += event["arguments"]
    else:
        report.notes["pairs whose picture shows an event of another type than the sentence"] += 1
        sample["events"].append(event)
    source = {**sample["source"], "crowds": seen["source"]["crowds"]}
    return {**sample, "image": seen["image"], "objects": seen["objects"], "source": source}


def _text_sample(record: dict[str, Any], place: Place, report: BuildReport) -> dict[str, Any]:
    tokens, events = jmee_events(record, report)
    return make_sample(SPEC, tokens, {**place, "sentence": str(record["sentence_id"])}, events=events)


def _image_sample(name: str, record: dict[str, Any], place: Place) -> dict[str, Any]:
    """A picture's one event, its arguments all visual; a box of two roles is one object."""
    boxes = [(role, tuple(box[1:]), str(box[0])) for role, found in record["role"].items() for box in found]
    ids = number_boxes(box for _, box, _ in boxes)
    crowds = {ids[box] for _, box, flag in boxes if flag == "0"}
    filled = dict.fromkeys((role, ids[box]) for role, box, _ in boxes)
    event = {
        "type": record["event_type"],
        "trigger": None,
        "arguments": [{"role": role, "object": item} for role, item in filled],
    }
    source = {**place, "crowds": [item for item in ids.values() if item in crowds]}
    objects = [{"id": item, "box": list(box), "label": ""} for box, item in ids.items()]
    return make_sample(SPEC, [], source, image=picture_name(f"{name}.jpg"), objects=objects, events=[event])


def _is_sentence(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    return isinstance(record.get("sentence_id"), str) and isinstance(record.get("words"), list)


def _article(name: str) -> str:
    """The article of a sentence or picture: its name without the last number."""
    return name.rpartition("_")[0]


def _split(article: str) -> str:
    """``dev`` for about a tenth of the articles, whatever else is in the file; ``train`` for the others."""
    return "dev" if int(hashlib.sha256(article.encode()).hexdigest(), 16) % 10 == 0 else "train"
