"""Pascal VOC boxes of tweets: objects of a sample, and malformed or unsafe files."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from lvlm_clorae.data.convert import build
from lvlm_clorae.data.convert.voc import MAX_XML_BYTES
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import build_prompt
from tests.helpers.shards import pil_image, read_split

TWEET = "IMGID:7\nAnn\tB-PER\nLee\tI-PER\nand\tO\nOak\tB-LOC\n\nIMGID:8\nHill\tB-PER\n"


def _object(name: str, *box: object) -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>0</difficult><bndbox>{sides}</bndbox></object>"


def _annotation(*objects: str) -> str:
    return f"<annotation><filename>7.jpg</filename><size><width>20</width></size>{''.join(objects)}</annotation>"


@pytest.fixture
def tweets(tmp_path: Path) -> Path:
    folder = tmp_path / "tweets"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text(TWEET, encoding="utf-8")
    (folder / "7.jpg").write_bytes(pil_image())
    return folder


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    folder = tmp_path / "boxes" / "xml"
    folder.mkdir(parents=True)
    return folder


def test_boxes_become_objects_without_names(tweets: Path, boxes: Path, tmp_path: Path) -> None:
    found = [
        _object("Oak", 9, 1, 19, 8),
        _object("Ann Lee", " 1 ", 2, "10.5", 9),
        _object("Lee", 1, 2, "10.5", "9.0"),
        _object("Oak", 5, 5, 5, 9),
        "<object><name>Elm</name></object>",
    ]
    (boxes / "7.xml").write_text(_annotation(*found), encoding="utf-8")
    report = build("twitter15", tweets, tweets, tmp_path / "out", boxes_dir=boxes.parent)
    first, second = read_split(tmp_path / "out", "twitter15", "train")
    assert first["objects"] == [
        {"id": "O1", "box": [1, 2, 10.5, 9], "label": ""},
        {"id": "O2", "box": [9, 1, 19, 8], "label": ""},
    ]
    assert first["source"]["boxes"] == {"O1": ["Ann Lee", "Lee"], "O2": ["Oak"]}
    assert "person objects: O1 <region> O2 <region> text: Ann" in build_prompt(first, "entity", ["person"])
    assert (second["objects"], "boxes" in second["source"]) == ([], False)
    assert report.notes["samples with boxes"] == 3
    assert report.notes["boxes left out because they are empty or reversed"] == 3
    assert verify(tmp_path / "out").ok


BOMB = (
    '<!DOCTYPE a [<!ENTITY a "xxxxxxxxxx">'
    + "".join(f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in zip("abcdefgh", "bcdefghi", strict=True))
    + f"]>{_annotation(_object('&i;', 1, 2, 3, 4))}"
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, "DOCTYPE"),
        (f'<?xml version="1.0" encoding="utf-16"?>{BOMB}'.encode("utf-16"), "DOCTYPE"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "DOCTYPE"),
        (_annotation(_object("&undeclared;", 1, 2, 3, 4)), "undefined entity"),
        ('<?xml version="1.0" encoding="no-such"?><a/>', "unknown encoding"),
        ("<annotation>", "no element found"),
        ("", "no element found"),
        ("\0", "line 1"),
        ("<a>" * 50000, "no element found"),
        (_annotation(_object("Ann", 1, 2, 3, "nan")), "bndbox/ymax is nan"),
        (_annotation(_object("Ann", 1, 2, "1e999", 3)), "bndbox/xmax is 1e999"),
        (_annotation(_object("Ann", "", 2, 3, 4)), "could not convert string to float"),
        (_annotation("<object><name>Ann</name><bndbox><xmin>1</xmin></bndbox></object>"), "no bndbox/ymin"),
        (" " * (MAX_XML_BYTES + 1), str(MAX_XML_BYTES)),
    ],
)
def test_malformed_and_unsafe_files_are_rejected(
    tweets: Path, boxes: Path, tmp_path: Path, content: str | bytes, reason: str
) -> None:
    (boxes / "7.xml").write_bytes(content if isinstance(content, bytes) else content.encode())
    tracemalloc.start()
    report = build("twitter15", tweets, None, tmp_path / "out", boxes_dir=boxes, max_rejected=0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20
    assert [(item.file, item.line) for item in report.rejected] == [
        ("train.txt", 1),
        ("valid.txt", 1),
        ("test.txt", 1),
    ]
    assert report.rejected[0].reason.startswith("its boxes, 7.xml: ")
    assert reason in report.rejected[0].reason


def test_invalid_boxes_directory_raises(tweets: Path, boxes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        build("twitter15", tweets, None, tmp_path / "out", boxes_dir=tmp_path / "absent")
    with pytest.raises(UserError, match=r"\.xml"):
        build("twitter15", tweets, None, tmp_path / "out", boxes_dir=boxes)
    (boxes / "7.xml").write_text(_annotation())
    with pytest.raises(UserError, match=r"mre_v1.*mre"):
        build("mre_v1", tweets, None, tmp_path / "out", boxes_dir=boxes)
