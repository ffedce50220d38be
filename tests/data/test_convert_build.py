"""Builds of shards from synthetic files in the format of Twitter-15, and guarantees of every build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lvlm_clorae.data.convert import CONVERTERS, PUBLISHED, TooManyRejected, build, load_converter
from lvlm_clorae.data.convert.common import BuildReport
from lvlm_clorae.data.convert.conll import bio_spans
from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from tests.helpers.shards import files, pil_image, read_split

TWEETS = """IMGID:11
Dr\tO
.\tO
Maple\tI-PER
visits\tO
New\tB-LOC
Elm\tI-LOC
Oak\tB-LOC
Fair\tI-OTHER

IMGID:12
\u00a0\tO
Line\u2028break\tB-ORG
IMGID:13
no\tO
"""


@pytest.fixture
def tweets(tmp_path: Path) -> Path:
    folder = tmp_path / "tweets"
    folder.mkdir()
    (folder / "train.txt").write_text(TWEETS, encoding="utf-8", newline="\n")
    (folder / "valid.txt").write_text("\ufeffIMGID:21\nHill\tB-PER\n\n\n", encoding="utf-8", newline="\r\n")
    (folder / "test.txt").write_text("IMGID:31\nHill\tO", encoding="utf-8")
    return folder


def test_a_user_error_of_a_converter_is_not_a_rejection() -> None:
    def make(record: str, origin: dict[str, object]) -> dict[str, object]:
        raise UserError("images: no such directory") if record == "missing" else ValueError("no text")

    report = BuildReport("toy")
    assert report.attempt(make, "empty", {"file": "train.txt", "line": 3}) is None
    assert [(rejection.line, rejection.reason) for rejection in report.rejected] == [(3, "no text")]
    with pytest.raises(UserError, match="images"):
        report.attempt(make, "missing", {"file": "train.txt", "line": 4})
    assert len(report.rejected) == 1


def test_twitter15_tweets(tweets: Path, tmp_path: Path) -> None:
    report = build("twitter15", tweets, None, tmp_path / "out")
    assert report.samples == {"train": 3, "dev": 1, "test": 1}
    assert (report.images, report.missing_images, report.rejected) == (0, 5, [])
    first, second, third = read_split(tmp_path / "out", "twitter15", "train")
    assert first["text"] == "Dr . Maple visits New Elm Oak Fair"
    assert first["image"] == "11.jpg"
    assert [(item["type"], item["span"], item["text"]) for item in first["entities"]] == [
        ("person", [2, 3], "Maple"),
        ("location", [4, 6], "New Elm"),
        ("location", [6, 7], "Oak"),
        ("miscellaneous", [7, 8], "Fair"),
    ]
    assert second["tokens"] == ["\u00a0", "Line\u2028break"]
    assert third["source"] == {"file": "train.txt", "line": 14, "id": "13"}
    assert verify(tmp_path / "out").ok
    assert "3 train, 1 dev, 1 test" in report.summary()


def test_images_are_found_by_name_in_subdirectories(tweets: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "deep" / "11.jpg").write_bytes(pil_image("PNG"))
    (images / "12.jpg").write_bytes(pil_image("JPEG"))
    (images / "13.jpg").write_bytes(b"<html>404</html>")
    report = build("twitter15", tweets, images, tmp_path / "out")
    assert (report.images, report.missing_images, report.unusable) == (2, 3, [str(images / "13.jpg")])
    found = list(read_samples(tmp_path / "out", load_index(tmp_path / "out"), "twitter15", "train"))
    assert [image for _, _, image in found] == [pil_image("PNG"), pil_image("JPEG"), None]
    assert [item["image"] for _, item, _ in found] == ["11.jpg", "12.jpg", "13.jpg"]


def test_build_is_deterministic(tweets: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build("twitter15", tweets, None, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-PER I-PER", [("PER", 1, 3)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("I-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("B-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)]),
        ("", []),
    ],
)
def test_bio_spans_equal_conlleval(tags: str, spans: list[tuple[str, int, int]]) -> None:
    assert bio_spans(tags.split()) == spans


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("IMGID:1\nno tab", "line 18"),
        ("IMGID:1\na\tb\tO", "line 18"),
        ("IMGID:1\n\tO", "line 18"),
        ("IMGID:1\na\tB-ANIMAL", "B-ANIMAL"),
        ("IMGID:1\na\tS-PER", "S-PER"),
        ("IMGID:1", "tokens"),
        ("a\tO", "IMGID:"),
        ("IMGID:../../etc/passwd\na\tO", "passwd"),
        ("IMGID:1\n\u00a0\tB-PER", "entities[0].text"),
    ],
)
def test_malformed_tweet_is_rejected_with_file_and_line(tweets: Path, tmp_path: Path, record: str, reason: str) -> None:
    (tweets / "train.txt").write_text(f"{TWEETS}\n{record}\n\nIMGID:99\nz\tO\n", encoding="utf-8")
    report = build("twitter15", tweets, None, tmp_path / "out", max_rejected=0.5)
    assert report.samples["train"] == 4
    (rejection,) = report.rejected
    assert (rejection.file, rejection.line) == ("train.txt", 17)
    assert reason in rejection.reason
    (line,) = (tmp_path / "out" / "rejected-twitter15.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == rejection.reason


def test_too_many_rejected_records_write_no_shards(tweets: Path, tmp_path: Path) -> None:
    (tweets / "train.txt").write_text("IMGID:1\nbroken\n", encoding="utf-8")
    with pytest.raises(TooManyRejected, match=r"1 of 3.*0\.5 %.*train\.txt, line 1") as caught:
        build("twitter15", tweets, None, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert len(caught.value.report.rejected) == 1
    assert list(files(tmp_path / "out")) == ["rejected-twitter15.jsonl"]
    assert not list(tmp_path.glob(".*"))


def test_limit_per_split(tweets: Path, tmp_path: Path) -> None:
    report = build("twitter15", tweets, None, tmp_path / "out", limit=2)
    assert report.samples == {"train": 2, "dev": 1, "test": 1}
    with pytest.raises(UserError, match="0"):
        build("twitter15", tweets, None, tmp_path / "other", limit=0)


def test_build_without_rejections_removes_an_old_list(tweets: Path, tmp_path: Path) -> None:
    (tweets / "train.txt").write_text("IMGID:1\nbroken\n", encoding="utf-8")
    with pytest.raises(TooManyRejected):
        build("twitter15", tweets, None, tmp_path / "out")
    (tweets / "train.txt").write_text(TWEETS, encoding="utf-8")
    report = build("twitter15", tweets, None, tmp_path / "out")
    assert report.rejected_file is None
    assert not list((tmp_path / "out").glob("rejected*"))


def test_invalid_arguments_and_files_raise(tweets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r'"twiter15".*"twitter15"'):
        build("twiter15", tweets, None, out)
    with pytest.raises(UserError, match="nan"):
        build("twitter15", tweets, None, out, max_rejected=float("nan"))
    with pytest.raises(UserError, match="--name"):
        build("twitter15", tweets, None, out, name="mine")
    with pytest.raises(UserError, match="absent"):
        build("twitter15", tweets, tmp_path / "absent", out)
    with pytest.raises(UserError, match=r"absent.*jefferyYu/UMT"):
        build("twitter15", tmp_path / "absent", None, out)
    (tweets / "valid.txt").unlink()
    with pytest.raises(UserError, match=r"valid\.txt or dev\.txt or val\.txt.*jefferyYu/UMT"):
        build("twitter15", tweets, None, out)
    (tweets / "valid.txt").write_bytes(b"IMGID:1\n\xff\tO\n")
    with pytest.raises(UserError, match=r"valid\.txt.*byte 8"):
        build("twitter15", tweets, None, out)
    assert not list(tmp_path.glob("*out*"))


def test_every_converter_describes_its_dataset() -> None:
    assert {*PUBLISHED, "jsonl", "captions"} == set(CONVERTERS)
    for name in PUBLISHED:
        spec = load_converter(name, Path()).spec
        assert spec.name == name
        assert set(spec.labels) == set(spec.subtasks) >= set(spec.reference_f1)
        assert json.loads(json.dumps(spec.labels)) == spec.labels
    counts = {
        name: len(load_converter(name, Path()).spec.labels[subtask])
        for name, subtask in (
            ("twitter15", "entity"),
            ("mre_v1", "relation"),
            ("mre_v2", "relation"),
            ("m2e2", "trigger"),
        )
    }
    assert counts == {"twitter15": 4, "mre_v1": 31, "mre_v2": 23, "m2e2": 8}
    ace = load_converter("ace2005", Path()).spec.labels["argument"]
    assert (len(ace["types"]), len(ace["roles"])) == (33, 35)
    assert set(load_converter("m2e2", Path()).spec.labels["trigger"]) < set(ace["types"])
    assert load_converter("swig", Path()).spec.labels == load_converter("m2e2", Path()).spec.labels


def test_reference_f1_of_each_dataset() -> None:
    """Those without a published single-task F1 have none, so that their achievement weight is relative to 100."""
    assert {name: dict(load_converter(name, Path()).spec.reference_f1) for name in PUBLISHED} == {
        "twitter15": {"entity": 78.9},
        "twitter17": {"entity": 89.8},
        "snap": {"entity": 90.2},
        "mre_v1": {"relation": 81.8},
        "mre_v2": {"relation": 82.0},
        "ace2005": {},
        "swig": {},
        "sroie": {},
        "funsd": {},
        "m2e2": {"trigger": 57.6, "argument": 23.4},
    }
