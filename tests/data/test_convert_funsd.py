"""Conversion of synthetic files in the layout of FUNSD."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lvlm_clorae.data.convert import BuildReport, build
from lvlm_clorae.data.convert.funsd import MAX_WORDS
from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.validation import verify
from lvlm_clorae.tasks import Counts, format_answer, score_sample, visible
from tests.helpers.shards import pil_image, read_split


def block(number: int, label: str, text: str, x: int, y: int, *linked: list[int]) -> dict[str, Any]:
    words = [{"text": word, "box": [x, y, x + 40, y + 10]} for word in text.split(" ")]
    return {"id": number, "label": label, "text": text, "box": [x, y, x + 40, y + 10], "words": words} | {
        "linking": list(linked)
    }


FORM = [
    block(0, "answer", "5 May", 60, 22, [3, 0]),
    block(1, "other", "page 1", 0, 40),
    block(2, "header", "NOTE", 20, 0, [2, 3]),
    block(3, "question", "Date:", 0, 20, [2, 3], [3, 0], [3, 5]),
    block(5, "answer", "", 60, 40, [3, 5]),
]
LONG = [
    *FORM,
    block(6, "question", "To:", 0, 60, [6, 7], [6, 8]),
    block(7, "answer", "Mara", 60, 60, [6, 7]),
    block(8, "answer", "Elm " * MAX_WORDS + "Elm", 0, 300, [6, 8]),
]


def build_forms(tmp_path: Path, form: Any = FORM) -> tuple[BuildReport, list[dict[str, Any]]]:
    for split in ("training", "testing"):
        for folder in ("annotations", "images"):
            (tmp_path / "in" / f"{split}_data" / folder).mkdir(parents=True, exist_ok=True)
        content = {"form": form if split == "testing" else FORM}
        (tmp_path / "in" / f"{split}_data" / "annotations" / f"{split}.json").write_text(json.dumps(content))
        (tmp_path / "in" / f"{split}_data" / "images" / f"{split}.png").write_bytes(pil_image(size=(120, 320)))
    report = build("funsd", tmp_path / "in", tmp_path / "in", tmp_path / "out", max_rejected=0.5)
    return report, read_split(tmp_path / "out", "funsd", "test")


def test_form(tmp_path: Path) -> None:
    report, (form,) = build_forms(tmp_path)
    assert form["text"] == "NOTE Date: 5 May page 1"
    assert format_answer(form, "entity") == "header, NOTE <spot> question, Date: <spot> answer, 5 May"
    assert format_answer(form, "link") == "Date: <spot> answer <spot> 5 May"
    assert form["source"] == {"file": "testing.json", "line": 1, "page": "testing", "ids": [2, 3, 0, 1]}
    assert form["layout"][1] == {"span": [1, 2], "box": [0, 40, 40, 60]}
    assert (form["task"], form["image"]) == ("document", "testing.png")
    for note in (
        "links from header to question, left out",
        "links with an end without a text, left out",
        "answer blocks without a text, left out",
        "words without a text, left out",
        "other blocks, no entities",
    ):
        assert report.notes[note] == 2, note
    assert sum(report.samples.values()) == 2
    assert verify(tmp_path / "out").ok


def test_link_between_sections_is_in_the_gold_of_its_question(tmp_path: Path) -> None:
    report, (first, second) = build_forms(tmp_path, LONG)
    assert [len(item["tokens"]) for item in (first, second)] == [8, MAX_WORDS + 1]
    assert [link["tail"]["text"].split()[0] for link in first["links"]] == ["5", "Mara", "Elm"]
    assert first["links"][2]["tail"] == {"text": "Elm " * MAX_WORDS + "Elm", "verbatim": False}
    assert second["links"] == []
    assert report.notes["links between two sections, whose answer is not in the text"] == 1
    learned = format_answer(visible(first, 8), "link")
    assert learned == "Date: <spot> answer <spot> 5 May <event> To: <spot> answer <spot> Mara"
    assert score_sample(first, learned, "link", ["answer"]).counts == Counts(2, 2, 3)
    ids = [number for item in (first, second) for number in item["source"]["ids"]]
    assert ids == [2, 3, 0, 1, 6, 7, 8]


def test_image_of_a_section_is_its_part_of_the_page(tmp_path: Path) -> None:
    build_forms(tmp_path, LONG)
    found = read_samples(tmp_path / "out", load_index(tmp_path / "out"), "funsd", "test")
    images = [image for _, _, image in found]
    assert [Image.open(io.BytesIO(image)).size for image in images if image] == [(101, 71), (101, 11)]


def test_repeated_texts_are_counted(tmp_path: Path) -> None:
    form = [
        block(0, "other", "Elm", 0, 0),
        block(1, "question", "Elm", 0, 20, [1, 2]),
        block(2, "answer", "yes", 60, 20, [1, 2]),
        block(3, "question", "Elm", 0, 40),
    ]
    report, _ = build_forms(tmp_path, form)
    assert report.notes["entities that repeat type and text in their section"] == 1
    assert report.notes["entities whose position an answer cannot express"] == 1  # the first Elm is no entity
    assert report.notes["links with an end whose text repeats in its section"] == 1


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ([], "no words"),
        ([FORM[0], FORM[0]], "an id occurs twice"),
        ([{**FORM[0], "linking": [[0, 99]]}], "99 is missing"),
        ([{**FORM[0], "linking": [[0]]}], "not enough values"),
        ([{**FORM[0], "box": None}], "NoneType"),
        ([{"id": 1}], "'label' is missing"),
        ("x", "string indices"),
    ],
)
def test_malformed_form_is_rejected(tmp_path: Path, form: Any, reason: str) -> None:
    report, found = build_forms(tmp_path, form)
    assert found == []
    assert [item.file for item in report.rejected] == ["testing.json"]
    assert reason in report.rejected[0].reason
