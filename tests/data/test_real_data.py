"""Conversion of the published annotation files, if available: counts, and gold answers that parse and score as gold."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.convert import BuildReport, build
from lvlm_clorae.data.convert.swig import MAPPING, read_mapping
from lvlm_clorae.data.convert.swig import TYPES as M2E2_TYPES
from lvlm_clorae.data.index import SPLITS, load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.validation import verify
from lvlm_clorae.tasks import MATCHES, Counts, format_answer, gold_tuples, ground, parse_answer, score_sample
from tests.helpers.published import DATA, FOLDERS

pytestmark = pytest.mark.real_data

Built = tuple[Path, BuildReport]

DOCUMENTS = ("funsd", "sroie")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Return a function that builds a dataset once, from its name to (directory, report)."""
    done: dict[str, Built] = {}

    def get(dataset: str) -> Built:
        source = DATA / FOLDERS.get(dataset, dataset)
        if not source.is_dir():
            pytest.skip(f"{source} is not available (set LVLM_CLORAE_REAL_DATA)")
        if dataset not in done:
            images = source if dataset in DOCUMENTS else DATA / "images"
            out = tmp_path_factory.mktemp(dataset)
            done[dataset] = out, build(dataset, source, images if images.is_dir() else None, out)
        return done[dataset]

    return get


def _samples(directory: Path, dataset: str) -> dict[str, list[dict[str, Any]]]:
    index = load_index(directory)
    return {split: [item for _, item, _ in read_samples(directory, index, dataset, split)] for split in SPLITS}


@pytest.mark.parametrize(
    ("dataset", "train", "dev", "test"),
    [
        ("twitter15", 4000, 1000, 3257),
        ("mre_v1", 7824, 975, 1282),
        # train and dev: 6013 sentences without 39 of the pairs, and 188 images
        ("m2e2", 5448, 714, 309),
        # a tenth of the published training pages becomes dev; FUNSD is in sections
        ("sroie", 224, 26, 99),
        ("funsd", 361, 37, 151),
    ],
)
def test_number_of_samples(built: Callable[[str], Built], dataset: str, train: int, dev: int, test: int) -> None:
    directory, report = built(dataset)
    assert report.rejected == []
    assert report.samples == {"train": train, "dev": dev, "test": test}
    found = verify(directory)
    assert found.problems == []
    assert found.samples.total() == train + dev + test


def test_twitter_entities_equal_the_tags(built: Callable[[str], Built]) -> None:
    directory, report = built("twitter15")
    lines = [line for path in (DATA / "twitter15").glob("*.txt") for line in path.read_text("utf-8").split("\n")]
    begun = sum("\tB-" in line for line in lines)
    entities = sum(len(item["entities"]) for split in _samples(directory, "twitter15").values() for item in split)
    assert entities == begun + report.notes["entities that begin with an I- tag"]


def test_relation_mentions_equal_their_published_names(built: Callable[[str], Built]) -> None:
    directory, report = built("mre_v1")
    for samples in _samples(directory, "mre_v1").values():
        for sample in samples:
            for end, name in (("head", "h_name"), ("tail", "t_name")):
                text = sample["relation"][end]["text"]
                assert "".join(sample["source"].get(name, text).split()) == "".join(text.split())
    assert report.notes["names that differ from their span in spaces only; the span is kept"] == 582


def test_receipts_and_their_fields(built: Callable[[str], Built]) -> None:
    directory, report = built("sroie")
    assert report.missing_images == 0
    entities = [item for split in _samples(directory, "sroie").values() for one in split for item in one["entities"]]
    assert len(entities) == 4 * 349
    assert sum("span" not in item for item in entities) == 26
    assert sum(not item.get("verbatim", True) for item in entities) == 26 + 77


def test_forms_and_their_links(built: Callable[[str], Built]) -> None:
    directory, report = built("funsd")
    splits = _samples(directory, "funsd")
    counted = {
        split: Counter(one["type"] for item in items for one in item["entities"]) for split, items in splits.items()
    }
    empty = sum(report.notes[f"{label} blocks without a text, left out"] for label in ("question", "answer", "header"))
    assert sum(counts.total() for counts in counted.values()) + empty == 7411 + 2332 - (902 + 312)
    links = [link for items in splits.values() for item in items for link in item["links"]]
    others = sum(count for note, count in report.notes.items() if note.startswith("links from"))
    assert len(links) + others + report.notes["links with an end without a text, left out"] == 5294
    assert sum("span" not in link["tail"] for link in links) == 263
    assert report.notes["links published twice, counted once"] == 18
    pages = [{item["source"]["page"] for item in items} for items in splits.values()]
    assert sum(map(len, pages)) == len(set.union(*pages)) == 199
    assert max(len(item["tokens"]) for items in splits.values() for item in items) == 115  # a row that is not cut


@pytest.mark.parametrize("dataset", DOCUMENTS)
def test_gold_of_documents_scores_100(built: Callable[[str], Built], dataset: str) -> None:
    """Except for what `offset` and `strict` cannot express, the whole gold does, also that outside the text."""
    directory, report = built(dataset)
    _assert_parses_to_gold(directory, dataset)
    entry, counts = load_index(directory).dataset(dataset), Counts()
    for samples in _samples(directory, dataset).values():
        for sample in samples:
            for subtask in entry.subtasks:
                answer = format_answer(sample, subtask)
                exact = score_sample(sample, answer, subtask, entry.labels[subtask]).counts
                assert exact.tp == exact.predicted == exact.gold
            answer = format_answer(sample, "entity")
            counts += score_sample(sample, answer, "entity", entry.labels["entity"], "offset").counts
    assert counts.gold - counts.tp == report.notes["entities whose position an answer cannot express"]


def test_m2e2_texts_images_and_boxes(built: Callable[[str], Built]) -> None:
    directory, report = built("m2e2")
    splits = _samples(directory, "m2e2")
    pairs, rest = splits["test"], splits["train"] + splits["dev"]
    only_images = [sample for sample in rest if sample["image"]]
    only_texts = [sample for sample in rest if not sample["image"]]
    assert len({sample["source"]["sentence"] for sample in pairs}) == 192
    assert len({sample["image"] for sample in pairs}) == 203
    assert len(only_images) == 188
    assert len(only_texts) + report.notes["sentences left out because they occur in the pairs"] == 6013
    objects = {sample["image"]: len(sample["objects"]) for sample in pairs + only_images}
    assert sum(objects.values()) == 1429
    assert not {sample["text"] for sample in pairs} & {sample["text"] for sample in only_texts}
    assert not {sample["image"] for sample in pairs} & {sample["image"] for sample in only_images}
    assert not {s["text"] for s in splits["train"] if s["text"]} & {s["text"] for s in splits["dev"]}
    assert all(sample["events"][0]["trigger"] for sample in pairs)
    assert sum(len(sample["events"]) == 2 for sample in pairs) == 2


@pytest.mark.parametrize("dataset", sorted(FOLDERS))
def test_gold_answers_parse_to_gold_tuples(built: Callable[[str], Built], dataset: str) -> None:
    directory, _ = built(dataset)
    _assert_parses_to_gold(directory, dataset)


def _assert_parses_to_gold(directory: Path, dataset: str) -> None:
    entry = load_index(directory).dataset(dataset)
    for samples in _samples(directory, dataset).values():
        for sample in samples:
            for subtask in entry.subtasks:
                parsed = parse_answer(format_answer(sample, subtask), subtask, entry.labels[subtask])
                read = ground(parsed, sample) if subtask == "argument" else parsed
                assert read == gold_tuples(sample, subtask), sample["source"]


@pytest.mark.parametrize("dataset", sorted(FOLDERS))
def test_gold_answers_score_exactly_100(built: Callable[[str], Built], dataset: str) -> None:
    directory, _ = built(dataset)
    _assert_scores_100(directory, dataset)


def _assert_scores_100(directory: Path, dataset: str) -> None:
    """Assert an F1 of 100 for every split, sub-task and match, over all gold tuples except the relation `none`.

    "strict" is above 97: where an earlier occurrence of its text is no argument, no answer has an argument's position.
    """
    entry = load_index(directory).dataset(dataset)
    for samples in _samples(directory, dataset).values():
        for subtask in entry.subtasks:
            gold = [item for sample in samples for item in gold_tuples(sample, subtask)]
            nothing = sum(subtask == "relation" and item[1] == "none" for item in gold)
            for match in MATCHES:
                counts = Counts()
                for sample in samples:
                    answer = format_answer(sample, subtask)
                    counts += score_sample(sample, answer, subtask, entry.labels[subtask], match).counts
                expected = len(gold) - (nothing if match != "umie" else 0)
                if match == "strict" and subtask in ("trigger", "argument"):
                    assert counts.f1 > 97
                    continue
                assert counts == Counts(expected, expected, expected), (subtask, match)
                assert counts.f1 == 100.0


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("JMEE_sample.json", "Life:Die, dead"),
        ("nlpcl_sample.json", "Personnel:End-Position, retirement"),
    ],
)
def test_both_forms_of_ace(tmp_path: Path, name: str, answer: str) -> None:
    source = DATA / "ace2005" / name
    if not source.is_file():
        pytest.skip(f"{source} is not available (set LVLM_CLORAE_REAL_DATA)")
    for split in SPLITS:
        shutil.copy(source, tmp_path / f"{split}.json")
    report = build("ace2005", tmp_path, None, tmp_path / "out", max_rejected=0)
    assert report.samples == {"train": 1, "dev": 1, "test": 1}
    (found,) = _samples(tmp_path / "out", "ace2005")["test"]
    assert format_answer(found, "trigger") == answer
    assert report.notes.total() == 0
    assert verify(tmp_path / "out").ok
    _assert_parses_to_gold(tmp_path / "out", "ace2005")
    _assert_scores_100(tmp_path / "out", "ace2005")


def test_verb_mapping() -> None:
    source, labels = DATA / "m2e2" / MAPPING, DATA / "swig"
    if not (source.is_file() and labels.is_dir()):
        pytest.skip(f"{source} or {labels} is not available (set LVLM_CLORAE_REAL_DATA)")
    events = read_mapping(source)
    assert len(events) == 67
    assert {event_type for event_type, _ in events.values()} == set(M2E2_TYPES)
    assert events["buying"][1] == {
        "agent": "Giver",
        "payment": "Instrument",
        "place": "Place",
        "seller": "Recipient",
    }
    assert set(events) <= set((labels / "verb_indices.txt").read_text().split())
    roles = {role for _, mapped in events.values() for role in mapped}
    assert roles <= set((labels / "role_indices.txt").read_text().split())
