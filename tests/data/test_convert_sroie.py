"""Conversion of synthetic files in the layout of SROIE."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae import cli
from lvlm_clorae.data.convert import BuildReport, build
from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import Counts, build_prompt, format_answer, score_sample, visible
from tests.data.test_convert_funsd import build_forms
from tests.helpers.launch import REPOSITORY
from tests.helpers.pages import commands
from tests.helpers.shards import pil_image, read_split

LINES = ["0,0,100,0,100,20,0,20,ELM BOOKS(M) LTD", "60,52,99,52,99,60,60,60,9.00", "0,50,50,50,50,60,0,60,TOTAL, RM"]
FIELDS = {"company": "ELM BOOKS (M) LTD", "date": "01/02/2018", "address": "", "total": "9.00"}
LABELS = ["company", "date", "address", "total"]


def build_receipts(
    tmp_path: Path, lines: list[str] = LINES, fields: Any = FIELDS, **how: Any
) -> tuple[BuildReport, list[dict[str, Any]]]:
    for split in ("train", "test"):
        for folder in ("box", "entities", "img"):
            (tmp_path / "in" / split / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / split / "box" / "X1.txt").write_text("\n".join(lines if split == "test" else LINES) + "\n\n")
        content = json.dumps(fields if split == "test" else FIELDS)
        (tmp_path / "in" / split / "entities" / "X1.txt").write_text(content)
        (tmp_path / "in" / split / "img" / "X1.jpg").write_bytes(pil_image("JPEG", (100, 60), len(split)))
    report = build("sroie", tmp_path / "in", tmp_path / "in" / "test", tmp_path / "out", max_rejected=0.5, **how)
    return report, read_split(tmp_path / "out", "sroie", "test")


def test_receipt(tmp_path: Path) -> None:
    report, (receipt,) = build_receipts(tmp_path)
    assert receipt["text"] == "ELM BOOKS(M) LTD TOTAL, RM 9.00"
    assert receipt["layout"] == [
        {"span": [0, 3], "box": [0, 0, 99, 33]},
        {"span": [3, 5], "box": [0, 83, 50, 99]},
        {"span": [5, 6], "box": [60, 86, 99, 99]},
    ]
    assert receipt["entities"] == [
        {"type": "company", "text": "ELM BOOKS (M) LTD", "span": [0, 3], "verbatim": False},
        {"type": "date", "text": "01/02/2018", "verbatim": False},
        {"type": "total", "text": "9.00", "span": [5, 6]},
    ]
    assert (receipt["task"], receipt["image"], report.images) == ("document", "X1.jpg", 2)
    assert report.notes["receipts without a published address"] == 2
    assert report.notes["date: published text is not in the text"] == 2
    assert sum(report.samples.values()) == 2
    assert verify(tmp_path / "out").ok


def test_gold_outside_the_text_counts_against_recall(tmp_path: Path) -> None:
    _, (receipt,) = build_receipts(tmp_path)
    assert format_answer(receipt, "entity").startswith("company, ELM BOOKS (M) LTD <spot> date, 01/02/2018 <spot>")
    learned = format_answer(visible(receipt, 6), "entity")
    assert learned == "company, ELM BOOKS (M) LTD <spot> total, 9.00"
    for match in ("exact", "offset", "strict"):
        assert score_sample(receipt, learned, "entity", LABELS, match).counts == Counts(2, 2, 3)
        assert score_sample(receipt, "company, ELM BOOKS(M) LTD", "entity", LABELS, match).counts == Counts(0, 1, 3)


def test_three_variants_of_a_dataset(tmp_path: Path) -> None:
    _, (boxes,) = build_receipts(tmp_path / "boxes")
    _, (text,) = build_receipts(tmp_path / "text", layout=False)
    assert text == {key: value for key, value in boxes.items() if key != "layout"}
    assert "text: [0 0 99 33] ELM BOOKS(M) LTD [0 83 50 99] TOTAL," in build_prompt(boxes, "entity", LABELS)
    assert "text: ELM BOOKS(M) LTD TOTAL," in build_prompt(text, "entity", LABELS)


@pytest.mark.parametrize(
    ("lines", "fields", "reason"),
    [
        (["1,2,3"], FIELDS, "line 1 of X1.txt is not eight coordinates"),
        (["1,2,3,4,5,6,7,ELM"], FIELDS, "line 1 of X1.txt is not eight coordinates"),
        (["1,2,3,4,5,6,7,x,ELM"], FIELDS, "invalid literal"),
        ([""], FIELDS, "no lines"),
        (LINES, [1], "JSON dict"),
        (LINES, {"company": 3}, "int"),
    ],
)
def test_malformed_receipt_is_rejected(tmp_path: Path, lines: list[str], fields: Any, reason: str) -> None:
    report, found = build_receipts(tmp_path, lines, fields)
    assert found == []
    assert [item.file for item in report.rejected] == ["X1.txt"]
    assert reason in report.rejected[0].reason


def test_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train/box.*rrc\.cvc\.uab\.es"):
        build("sroie", tmp_path, None, tmp_path / "out")


def test_documented_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_receipts(tmp_path / "sroie")
    build_forms(tmp_path / "funsd")
    monkeypatch.chdir(tmp_path)
    for line in commands(REPOSITORY / "docs/data.md", "lvlm-clorae shards build"):
        words = shlex.split(re.sub(r"/data/(\w+)", rf"{tmp_path}/\1/in", line))
        words[words.index("--images") + 1] += "/test" if "sroie" in words else ""
        assert cli.main(words[1:]) == 0
    assert set(load_index(tmp_path / "shards/documents").datasets) == {"sroie", "funsd"}
    assert cli.main([*words[1:-1], str(tmp_path / "none"), "--layout", "none"]) == 0
    assert all("layout" not in item for item in read_split(tmp_path / "none", "funsd", "test"))
