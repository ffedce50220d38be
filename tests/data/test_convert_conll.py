"""Twitter-17 and SNAP: synthetic files in the format of Twitter-15 (tests/data/test_convert_build.py), with MISC."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2, Entities

from lvlm_clorae.data.convert import build
from lvlm_clorae.data.convert.conll import bio_spans
from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.validation import verify
from tests.helpers.shards import files, read_split

TWEETS = "IMGID:17_06_12\nElm\tB-MISC\nFair\tI-MISC\nin\tO\nOak\tB-LOC\n\nIMGID:O_25\nHill\tB-PER\n"


@pytest.mark.parametrize(
    ("dataset", "dev", "reference"), [("twitter17", "valid", 89.8), ("snap", "dev", 90.2), ("snap", "val", 90.2)]
)
def test_twitter17_and_snap(tmp_path: Path, dataset: str, dev: str, reference: float) -> None:
    for name in ("train", dev, "test"):
        (tmp_path / f"{name}.txt").write_text(TWEETS, encoding="utf-8")
    report = build(dataset, tmp_path, None, tmp_path / "out")
    build(dataset, tmp_path, None, tmp_path / "again")
    assert report.samples == {"train": 2, "dev": 2, "test": 2}
    first, second = read_split(tmp_path / "out", dataset, "dev")
    assert [(item["type"], item["text"]) for item in first["entities"]] == [
        ("miscellaneous", "Elm Fair"),
        ("location", "Oak"),
    ]
    assert (first["dataset"], first["image"], second["image"]) == (dataset, "17_06_12.jpg", "O_25.jpg")
    assert first["source"] == {"file": f"{dev}.txt", "line": 1, "id": "17_06_12"}
    assert load_index(tmp_path / "out").dataset(dataset).reference_f1 == {"entity": reference}
    assert verify(tmp_path / "out").ok
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_spans_equal_those_of_seqeval() -> None:
    """They are those of its default mode; its strict IOB2 mode has those that begin with a B- tag."""
    rng, disagreements = random.Random(0), 0
    for _ in range(2000):
        tags = rng.choices(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"], k=rng.randint(1, 12))
        found = bio_spans(tags)
        assert found == [(label, start, last + 1) for label, start, last in get_entities(tags)]
        strict = [item.to_tuple()[1:] for item in Entities([tags], IOB2).entities[0]]
        assert strict == [span for span in found if tags[span[1]].startswith("B")]
        disagreements += len(strict) < len(found)
    assert disagreements > 100
