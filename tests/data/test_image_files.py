"""Image files are found by name or path, never another file's bytes; ambiguous names are errors."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from lvlm_clorae.data.convert import build
from lvlm_clorae.data.convert.image_files import ImageFiles
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from tests.data.test_images import oriented
from tests.helpers.shards import pil_image

ONE, OTHER = pil_image("PNG", (4, 4)), pil_image("PNG", (5, 5))


def write(root: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = root / name.replace("__", "/").replace("_png", ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_a_name_in_any_folder_and_a_path_are_found(tmp_path: Path) -> None:
    files = ImageFiles(write(tmp_path, a__x_png=ONE, b__y_png=OTHER), [])
    assert files.read("x.png") == files.read("a/x.png") == ONE
    assert files.read("b/x.png") is files.read("z.png") is files.read(None) is None


def test_different_files_of_a_name_are_an_error_unless_their_path_is_given(tmp_path: Path) -> None:
    files = ImageFiles(write(tmp_path, a__x_png=ONE, b__x_png=OTHER, a__same_png=ONE, b__same_png=ONE), [])
    with pytest.raises(UserError, match=r"a/x\.png.*b/x\.png"):
        files.read("x.png")
    assert (files.read("a/x.png"), files.read("b/x.png"), files.read("same.png")) == (ONE, OTHER, ONE)


def test_another_file_of_the_stem_is_not_taken(tmp_path: Path) -> None:
    files = ImageFiles(write(tmp_path, x_png=ONE), [])
    assert files.read("x.jpg") is None


def test_unicode_normal_forms_are_equal(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café/Zoë.png") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for stored, asked in ((composed, decomposed), (decomposed, composed)):
        root = tmp_path / unicodedata.name(stored[3])
        (root / stored).parent.mkdir(parents=True)
        (root / stored).write_bytes(ONE)
        files = ImageFiles(root, [])
        assert files.read(asked) == files.read(Path(asked).name) == ONE


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", x_png=ONE)
    root = tmp_path / "images"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "loop").symlink_to(root, target_is_directory=True)
    assert ImageFiles(root, []).read("x.png") == ONE


@pytest.mark.parametrize("data", [b"", b"<html>", ONE[: len(ONE) // 2], pil_image("JPEG", (300, 300))[:-400]])
def test_files_that_cannot_be_decoded_are_reported(tmp_path: Path, data: bytes) -> None:
    unusable: list[str] = []
    assert ImageFiles(write(tmp_path, x_png=data), unusable).read("x.png") is None
    assert unusable == [str(tmp_path / "x.png")]


def jsonl(folder: Path, *records: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def test_many_missing_images_are_a_warning_with_examples(tmp_path: Path) -> None:
    entity = {"type": "a", "text": "x"}
    records = [{"text": "x", "image": f"p/{number}.png", "entities": [entity]} for number in range(9)]
    images = tmp_path / "images"
    for present, warned in ((7, True), (8, False)):
        for number in range(present):
            write(images / "p", **{f"{number}_png": ONE})
        report = build("jsonl", jsonl(tmp_path / str(present), *records), images, tmp_path / f"out{present}")
        assert (report.images, report.missing_images) == (present, 9 - present)
        assert ("WARNING" in report.summary()) == warned
        assert ("p/8.png" in report.summary()) == warned


@pytest.mark.parametrize(("box", "valid"), [([0, 60, 50, 100], True), ([60, 0, 100, 50], False)])
def test_boxes_are_in_the_upright_frame(tmp_path: Path, box: list[int], valid: bool) -> None:
    """The stored 100 x 50 image is turned to 50 x 100, as every viewer shows it."""
    images = write(tmp_path / "images", x_png=oriented(6))
    argument = {"role": "r", "object": "O1"}
    event = {"type": "t", "trigger": {"text": "x"}, "arguments": [argument]}
    folder = jsonl(tmp_path / "in", {"text": "x", "image": "x.png", "objects": [{"box": box}], "events": [event]})
    if not valid:
        with pytest.raises(UserError, match="outside"):
            build("jsonl", folder, images, tmp_path / "out")
        return
    build("jsonl", folder, images, tmp_path / "out")
    assert verify(tmp_path / "out").ok
