"""Captions of a CSV file and of COCO's JSON: one sample a caption, no image in two splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.convert import TooManyRejected, build
from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.inspect import gather
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from tests.helpers.captions import COLOURS, PER_IMAGE, write_captions, write_images
from tests.helpers.shards import files, read_split


def coco(*images: str, **changes: Any) -> str:
    annotations = [
        {"id": n, "image_id": images.index(name), "caption": f"{n} a  meal."} for n, name in enumerate(images)
    ]
    names = [{"id": number, "file_name": name} for number, name in enumerate(images)]
    return json.dumps({"info": {}, "images": names, "annotations": annotations[::-1], **changes})


def test_each_caption_is_a_sample_and_a_tenth_of_the_images_is_held_out(tmp_path: Path) -> None:
    folder = write_captions(tmp_path / "in")
    report = build("captions", folder, folder, tmp_path / "out", name="colours")
    held_out = -(-len(COLOURS) // 10)
    assert report.samples == {"train": PER_IMAGE * (len(COLOURS) - held_out), "test": PER_IMAGE * held_out}
    train, test = (read_split(tmp_path / "out", "colours", split) for split in ("train", "test"))
    assert {item["image"] for item in train}.isdisjoint(item["image"] for item in test)
    assert {item["image"] for item in (*train, *test)} == {f"{colour}.png" for colour in COLOURS}
    assert all(item["caption"].split()[2 if "Tamsk" in item["caption"] else 3] in item["image"] for item in train)
    assert (train[0]["task"], train[0]["text"], train[0]["tokens"]) == ("caption", "", [])
    assert load_index(tmp_path / "out").dataset("colours").subtasks == ("caption",)
    assert verify(tmp_path / "out").ok
    assert gather(tmp_path / "out")["colours"].splits["test"].counts["samples"] == PER_IMAGE * held_out


def test_the_split_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    folder = write_captions(tmp_path / "in")
    build("captions", folder, folder, tmp_path / "out", name="colours")
    build("captions", folder, folder, tmp_path / "again", name="colours")
    assert files(tmp_path / "out") == files(tmp_path / "again")
    header, *lines = (folder / "captions.csv").read_text().splitlines()
    (folder / "captions.csv").write_text("\n".join([header, *lines[::-1]]))
    build("captions", folder, folder, tmp_path / "turned", name="colours")
    first, second = (
        {item["image"] for item in read_split(tmp_path / out, "colours", "test")} for out in ("out", "turned")
    )
    assert first == second


def test_coco_has_a_file_a_split(tmp_path: Path) -> None:
    first, *others = write_images(tmp_path / "images", 5)
    (tmp_path / "captions_train2017.json").write_text(coco(*others))
    (tmp_path / "captions_val2017.json").write_text(coco(first))
    report = build("captions", tmp_path, tmp_path / "images", tmp_path / "out", name="coco")
    assert (report.samples, report.images) == ({"train": 4, "dev": 1}, 5)
    train = list(read_samples(tmp_path / "out", load_index(tmp_path / "out"), "coco", "train"))
    assert [sample["image"] for _, sample, _ in train] == others, "captions of an image follow each other"
    assert [sample["caption"] for _, sample, _ in train] == [f"{n} a meal." for n in range(4)]
    assert [image for *_, image in train] == [(tmp_path / "images" / name).read_bytes() for name in others]


def test_an_image_of_two_splits_is_rejected(tmp_path: Path) -> None:
    folder = write_captions(tmp_path / "in", 3, "train.csv")
    (folder / "test.csv").write_text("image,caption\nred.png,A red image .\ngreen.png,Green .")
    with pytest.raises(TooManyRejected, match=r"red\.png is also in train"):
        build("captions", folder, folder, tmp_path / "out", name="colours")
    report = build("captions", folder, folder, tmp_path / "out", name="colours", max_rejected=0.5)
    assert (report.samples, len(report.rejected)) == ({"train": 6}, 2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("absent.png,A caption", "absent.png is missing"),
        ("red.png,Black, red and white", "too few or too many columns"),
        ("red.png", "too few or too many columns"),
        ("red.png,  ", "caption: must be a string that is not blank"),
        ("../red.png,A caption", "image name"),
        ('red.png,"a dog\nblue.png,a ""cat"" sits"', "a quote before it"),
    ],
)
def test_an_invalid_caption_is_rejected(line: str, reason: str, tmp_path: Path) -> None:
    folder = write_captions(tmp_path / "in", 2)
    with (folder / "captions.csv").open("a") as file:
        file.write(f'red.png,"one, two"\n{line}\n')
    report = build("captions", folder, folder, tmp_path / "out", name="colours", max_rejected=0.5)
    (rejected,) = report.rejected
    assert reason in rejected.reason
    assert (rejected.file, rejected.line) == ("captions.csv", 7 + line.count("\n"))
    assert "one, two" in [
        item["caption"] for split in report.samples for item in read_split(tmp_path / "out", "colours", split)
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "none of captions.csv"),
        ({"captions.csv": "image,caption\na,b", "train.csv": "image,caption\na,b"}, "more than one of"),
        ({"captions.csv": "file,caption\na,b"}, "no column image"),
        ({"captions.csv": "image,caption\n"}, "no captions"),
        ({"captions.csv": "image,caption\na,\0"}, "captions.csv"),
        ({"captions.csv": 'image,caption\na,b\nc,"d\ne,f'}, "captions.csv, line 3: "),
        ({"captions.csv": 'image,caption\na,"b"c'}, "captions.csv, line 2: "),
        ({"captions.json": "{"}, "not valid JSON"),
        ({"captions.json": coco("a", images=[])}, "not COCO's captions"),
        ({"captions.json": coco("a", annotations=None)}, "not COCO's captions"),
    ],
)
def test_a_file_that_cannot_be_read(content: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        build("captions", tmp_path, tmp_path, tmp_path / "out", name="colours")
