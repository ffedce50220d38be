"""FUNSD: questions, answers and headers of scanned forms, and the links from questions to answers (Jaume et al. 2019).

    training_data/annotations/X.json   {"form": [{"id", "label", "box", "words": [{"text", "box"}], "linking"}, ...]}
    training_data/images/X.png         the scan, below --images
    testing_data/                      the same

A page is cut into sections of at most `MAX_WORDS` words (`documents.sections`), which are samples with the ids of their
blocks in ``source["ids"]`` and, if there is one, their part of the scan. Every entity and link of a page is in one
sample, so sums over samples are scores of pages. A link between two sections is in the one of its question; its answer
has no span there, so it counts against recall.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert import common, documents
from lvlm_clorae.data.convert.common import BuildReport, Converted, Converter, Origin, Sample
from lvlm_clorae.data.convert.documents import Block
from lvlm_clorae.data.convert.image_files import ImageFiles
from lvlm_clorae.data.index import DatasetSpec
from lvlm_clorae.tasks.score import gold_spans, gold_tuples, locate

MAX_WORDS = 80
TYPES = ["question", "answer", "header"]
LINK = "answer"
FOLDERS = {"train": "training_data/annotations", "test": "testing_data/annotations"}
PUBLISHED = "guillaumejaume.github.io/FUNSD"
SPEC = DatasetSpec("funsd", documents.TASK, ("entity", "link"), {"entity": TYPES, "link": [LINK]}, {})

Page = list[dict[str, Any]]
Link = tuple[int, int]  # ids of question and answer


def _convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    image_files = ImageFiles(images, report.unusable)
    for split, number, path in documents.page_files(input_dir, FOLDERS, "*.json", PUBLISHED):
        if report.full(split):
            continue
        image = image_files.read(f"{path.stem}.png")
        made = report.attempt(partial(_samples, report, image), path, documents.origin(path, number))
        for section, (sample, part) in enumerate(made or (), 1):
            yield split, common.make_key(number, f"{path.stem}-{section:02d}"), sample, part


def _samples(report: BuildReport, image: bytes | None, path: Path, origin: Origin) -> list[tuple[Sample, bytes | None]]:
    form: Page = common.parse_json(common.read_bounded(path), path.name, dict)["form"]
    labels = {item["id"]: item["label"] for item in form}
    if len(labels) < len(form):
        raise ValueError("an id occurs twice")
    notes: Counter[str] = Counter()
    blocks = _blocks(form, notes)
    texts = {block.number: " ".join(block.words) for block in blocks}
    links = _links(form, labels, texts, notes)
    left, _, right, _ = documents.extent(blocks)
    found = []
    for section in documents.sections(documents.rows(blocks), MAX_WORDS):
        _, top, _, bottom = documents.extent(section)
        frame = left, top, right, bottom
        sample = _section(path.stem, section, labels, links, texts, origin, notes)
        sample["layout"] = documents.layout(section, frame)
        found.append((sample, documents.crop(image, frame)))
    report.notes += notes
    return found


def _blocks(form: Page, notes: Counter[str]) -> list[Block]:
    """Return the blocks that have a text; as in LayoutLM's preparation, a word without one is left out."""
    found = []
    for item in form:
        written = [word for word in item["words"] if word["text"].split()]
        notes["words without a text, left out"] += len(item["words"]) - len(written)
        words = [token for word in written for token in word["text"].split()]
        notes["blocks whose text differs from their words; the words are used"] += words != item["text"].split()
        if words:
            found.append(Block(item["id"], words, tuple(item["box"]), tuple(written[0]["box"])))
        elif item["label"] in TYPES:
            notes[f"{item['label']} blocks without a text, left out"] += 1
    if not found:
        raise ValueError("the page has no words")
    return found


def _links(form: Page, labels: dict[int, str], texts: dict[int, str], notes: Counter[str]) -> list[Link]:
    """Return the links from a question to an answer; each is published at both of its ends."""
    listed, found = Counter(tuple(link) for item in form for link in item["linking"]), []
    notes["links published twice, counted once"] += sum(times > 2 for times in listed.values())
    for head, tail in listed:
        if (labels[head], labels[tail]) != ("question", "answer"):
            notes[f"links from {labels[head]} to {labels[tail]}, left out"] += 1
        elif head not in texts or tail not in texts:
            notes["links with an end without a text, left out"] += 1
        else:
            found.append((head, tail))
    return found


def _section(
    page: str,
    blocks: Sequence[Block],
    labels: dict[int, str],
    links: Sequence[Link],
    texts: dict[int, str],
    origin: Origin,
    notes: Counter[str],
) -> Sample:
    tokens, spans = [word for block in blocks for word in block.words], documents.spans(blocks)
    order = {number: position for position, number in enumerate(spans)}

    def mention(number: int) -> dict[str, Any]:
        return common.mention(tokens, *spans[number]) if number in spans else {"text": texts[number], "verbatim": False}

    notes["other blocks, no entities"] += sum(labels[number] == "other" for number in order)
    entities = [{"type": labels[number], **mention(number)} for number in order if labels[number] in TYPES]
    own = sorted((order[head], order.get(tail, len(order)), head, tail) for head, tail in links if head in order)
    found = [{"head": mention(head), "label": LINK, "tail": mention(tail)} for _, _, head, tail in own]
    notes["links between two sections, whose answer is not in the text"] += sum(tail not in spans for *_, tail in own)
    source = {**origin, "page": page, "ids": list(order)}
    sample = common.make_sample(SPEC, tokens, source, image=f"{page}.png", entities=entities, links=found)
    _count_repeated(sample, notes)
    return sample


def _count_repeated(sample: Sample, notes: Counter[str]) -> None:
    """Count the entities and links that an answer cannot tell apart."""
    tuples, gold = gold_tuples(sample, "entity"), gold_spans(sample)
    notes["entities that repeat type and text in their section"] += len(tuples) - len(set(tuples))
    notes["entities whose position an answer cannot express"] += len(set(gold) - set(locate(tuples, sample)))
    names = Counter(text for _, text in tuples)
    ends = [{names[link[end]["text"]] for end in ("head", "tail")} for link in sample["links"]]
    notes["links with an end whose text repeats in its section"] += sum(max(counts) > 1 for counts in ends)


CONVERTER = Converter(SPEC, _convert)
