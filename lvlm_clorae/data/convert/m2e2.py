"""M2E2: events and their arguments in news sentences and images (Li et al., ACL 2020).

Published at github.com/limanling/m2e2, data/m2e2_annotations.zip; each file can be beside the archive or only in it.

- test: the 309 sentence-image pairs of crossmedia_coref.txt, with text_multimedia_event.json and
  image_multimedia_event.json. The boxes of the image's event become arguments of the sentence's event of the same type.
  If the types differ (2 pairs), the image's event is added without a trigger.
- train and dev: text_only_event.json, including sentences without events, and image_only_event.json, without the
  sentences and images of the pairs. Sentences and images of one article are in the same split, about a tenth in dev.

A box is ``[flag, x1, y1, x2, y2]`` in pixels. Flag "0" marks one box around a crowd; such boxes are objects like the
others and are listed in ``source["crowds"]``.
"""

import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert import common
from lvlm_clorae.data.convert.common import BuildReport, Converted, Converter, Origin, Sample
from lvlm_clorae.data.convert.events import text_events, visual_event
from lvlm_clorae.data.convert.image_files import ImageFiles
from lvlm_clorae.errors import UserError

ARCHIVE = "m2e2_annotations.zip"
PAIRS, PAIR_TEXTS, PAIR_IMAGES = "crossmedia_coref.txt", "text_multimedia_event.json", "image_multimedia_event.json"
TEXTS, IMAGES = "text_only_event.json", "image_only_event.json"
PUBLISHED = f"github.com/limanling/m2e2, data/{ARCHIVE}"

SPEC = common.published_spec("m2e2")

Texts = dict[str, dict[str, Any]]


def _convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """Convert the pairs (test), then the sentences and the images (train and dev), each in its file's order."""
    records = common.parse_json(_read(input_dir, PAIR_TEXTS), PAIR_TEXTS, list)
    records = [record for record in records if isinstance(record, dict) and isinstance(record.get("words"), list)]
    paired_texts = {item["sentence_id"]: item for item in records if isinstance(item.get("sentence_id"), str)}
    paired_images = common.parse_json(_read(input_dir, PAIR_IMAGES), PAIR_IMAGES, dict)
    pairs = _read(input_dir, PAIRS).decode("utf-8", "replace").splitlines()
    texts = common.parse_json(_read(input_dir, TEXTS), TEXTS, list)
    only_images = common.parse_json(_read(input_dir, IMAGES), IMAGES, dict)
    image_files = ImageFiles(images, report.unusable)
    yield from _convert_pairs(pairs, paired_texts, paired_images, image_files, report)
    yield from _convert_texts(texts, paired_texts, report)
    yield from _convert_images(only_images, paired_images, image_files, report)


def _convert_pairs(
    lines: list[str], texts: Texts, images: dict[str, Any], image_files: ImageFiles, report: BuildReport
) -> Iterator[Converted]:
    for number, line in enumerate(lines, 1):
        if report.full("test"):
            return
        if not line.strip():
            continue
        sample = report.attempt(partial(_pair, texts, images, report), line, {"file": PAIRS, "line": number})
        if sample is not None:
            key = common.make_key(number, f"{sample['source']['sentence']}-{sample['image'].removesuffix('.jpg')}")
            yield "test", key, sample, image_files.read(sample["image"])


def _convert_texts(records: list[Any], paired: Texts, report: BuildReport) -> Iterator[Converted]:
    paired_words = {" ".join(map(str, record["words"])) for record in paired.values()}
    article_of: dict[str, str] = {}
    for number, record in enumerate(records, 1):
        sample = report.attempt(partial(_text_sample, report), record, {"file": TEXTS, "line": number})
        if sample is None:
            continue
        sentence = sample["source"]["sentence"]
        if sentence in paired or sample["text"] in paired_words:
            report.notes["sentences left out because they occur in the pairs"] += 1
            continue
        # A sentence that several articles repeat must not be in train and in dev.
        split = common.hashed_split(article_of.setdefault(sample["text"], _article(sentence)))
        if not report.full(split):
            yield split, common.make_key(number, sentence), sample, None


def _convert_images(
    records: dict[str, Any], paired: dict[str, Any], image_files: ImageFiles, report: BuildReport
) -> Iterator[Converted]:
    for number, (name, record) in enumerate(records.items(), 1):
        if name in paired:
            report.notes["images left out because they occur in the pairs"] += 1
            continue
        split = common.hashed_split(_article(name))
        if report.full(split):
            continue
        sample = report.attempt(partial(_image_sample, name), record, {"file": IMAGES, "line": number})
        if sample is not None:
            yield split, common.make_key(number, f"image-{name}"), sample, image_files.read(sample["image"])


def _read(input_dir: Path, name: str) -> bytes:
    """Read a file beside the archive, else inside it. Raises UserError if it is in neither, or too large."""
    path = common.find_input(input_dir, (name, ARCHIVE), PUBLISHED)
    if path.name == name:
        return common.read_bounded(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                # The published archive also contains __MACOSX/._ files; the member's own size bounds the unpacking.
                if member.filename.rpartition("/")[2] == name and not member.filename.startswith("__MACOSX"):
                    if member.file_size > common.MAX_INPUT_BYTES:
                        raise UserError(f"{path}: {name} in it would unpack to {member.file_size} bytes.")
                    return archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}). Download it again from {PUBLISHED}.") from None
    raise UserError(f"{input_dir}: contains no {name}, and neither does {ARCHIVE}. It is published at {PUBLISHED}.")


def _pair(texts: Texts, images: dict[str, Any], report: BuildReport, line: str, origin: Origin) -> Sample:
    sentence, image, event_type = line.split("\t")
    name = image.removesuffix(".jpg")
    if sentence not in texts or name not in images:
        raise ValueError(f"{sentence} is not in {PAIR_TEXTS}, or {image} not in {PAIR_IMAGES}")
    sample = _text_sample(report, texts[sentence], origin)
    seen = _image_sample(name, images[name], origin)
    (event,) = seen["events"]
    same = [own for own in sample["events"] if own["type"] == event["type"] == event_type]
    if same:
        same[0]["arguments"] += event["arguments"]
    else:
        report.notes["pairs whose image shows an event of another type than the sentence"] += 1
        sample["events"].append(event)
    source = {**sample["source"], "crowds": seen["source"]["crowds"]}
    return {**sample, "image": seen["image"], "objects": seen["objects"], "source": source}


def _text_sample(report: BuildReport, record: dict[str, Any], origin: Origin) -> Sample:
    tokens, events = text_events(record, report)
    return common.make_sample(SPEC, tokens, {**origin, "sentence": str(record["sentence_id"])}, events=events)


def _image_sample(name: str, record: dict[str, Any], origin: Origin) -> Sample:
    """Build the sample of an image with one event and visual arguments; a box of two roles is one object."""
    boxes = [(role, tuple(box[1:]), str(box[0])) for role, found in record["role"].items() for box in found]
    event, ids = visual_event(record["event_type"], [(role, box) for role, box, _ in boxes])
    crowds = {ids[box] for _, box, flag in boxes if flag == "0"}
    source = {**origin, "crowds": [item for item in ids.values() if item in crowds]}
    image, objects = common.image_name(f"{name}.jpg"), common.box_objects(ids)
    return common.make_sample(SPEC, [], source, image=image, objects=objects, events=[event])


def _article(name: str) -> str:
    """Return the article of a sentence or image: its name without the last number."""
    return name.rpartition("_")[0]


CONVERTER = Converter(SPEC, _convert)
