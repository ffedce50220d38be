"""Validation finds each type of damage, with shard and key, and continues."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lvlm_clorae.data.validation import Report, unknown_labels, verify
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.errors import UserError
from tests.data.test_reader import HOSTILE, member
from tests.helpers.shards import SPEC, pil_image, sample, write_toy

SHARD = "toy-train-000000.tar"


def _messages(report: Report) -> str:
    return "\n".join(map(str, report.problems))


def _write(directory: Path, *items: tuple[dict, bytes | None]) -> Report:
    with ShardWriter(directory, SPEC) as writer:
        for number, (item, image) in enumerate(items):
            writer.add("train", f"k{number}", item, image)
    return verify(directory)


def test_valid_shards_have_no_problems(tmp_path: Path) -> None:
    write_toy(tmp_path, max_samples=3)
    write_toy(tmp_path, dataclasses.replace(SPEC, name="other"))
    report = verify(tmp_path)
    assert report.ok
    assert report.problems == []
    assert (report.shards, report.images, report.missing_images) == (6, 10, 0)
    assert report.samples == {"toy/train": 7, "toy/test": 2, "other/train": 7, "other/test": 2}


def test_missing_annotation(tmp_path: Path) -> None:
    spec = dataclasses.replace(
        SPEC, task="own", subtasks=("entity", "relation"), labels={**SPEC.labels, "relation": ["none"]}
    )
    write_toy(tmp_path, spec, counts=(("test", 1),))
    report = verify(tmp_path)
    assert "toy-test-000000.tar, 000000_toy: has no relation" in _messages(report)


def test_missing_index_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no index\.json"):
        verify(tmp_path)


def test_flipped_byte(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    data = bytearray((tmp_path / SHARD).read_bytes())
    data[index.dataset("toy").splits["train"][0].offsets[2] + 512 + 20] ^= 0x80
    (tmp_path / SHARD).write_bytes(data)
    report = verify(tmp_path)
    assert f"{SHARD}: its SHA-256" in _messages(report)
    assert f"{SHARD}, 000002_toy: JSON: not" in _messages(report)
    assert report.samples["toy/train"] == 7


def test_every_single_flipped_byte_is_found(tmp_path: Path) -> None:
    write_toy(tmp_path, counts=(("train", 1),))
    good = (tmp_path / SHARD).read_bytes()
    for position in range(0, len(good), 97):
        (tmp_path / SHARD).write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        assert "SHA-256" in _messages(verify(tmp_path))


@pytest.mark.parametrize("left", [0, 100, 512, 1000, 5000])
def test_truncated_shard(tmp_path: Path, left: int) -> None:
    write_toy(tmp_path)
    (tmp_path / SHARD).write_bytes((tmp_path / SHARD).read_bytes()[:left])
    report = verify(tmp_path)
    assert f"{SHARD}: has {left} bytes" in _messages(report)
    assert f"{SHARD}: has {report.samples['toy/train']} samples" in _messages(report)
    assert report.samples["toy/test"] == 2


def test_missing_and_unknown_shards(tmp_path: Path) -> None:
    write_toy(tmp_path)
    (tmp_path / SHARD).rename(tmp_path / "stray.tar")
    assert [(problem.shard, problem.key) for problem in verify(tmp_path).problems] == [
        (SHARD, None),
        ("stray.tar", None),
    ]


def _index(directory: Path, data: bytes, offsets: tuple[int, ...] = (0,)) -> None:
    """Write ``data`` as the only shard, and an index that agrees with it."""
    path, index = directory / SHARD, directory / "index.json"
    write_toy(directory, counts=(("train", 1),))
    path.write_bytes(data)
    content = json.loads(index.read_text(encoding="utf-8"))
    sizes = {"samples": len(offsets), "offsets": offsets, "bytes": len(data), "images": 0}
    content["datasets"]["toy"]["splits"]["train"][0] |= {**sizes, "sha256": hashlib.sha256(data).hexdigest()}
    index.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_member_is_a_line_and_other_shards_are_read(tmp_path: Path, data: bytes) -> None:
    good = member("a.json", json.dumps(sample()).encode())
    _index(tmp_path, good + data + bytes(1024), (0, len(good)))
    write_toy(tmp_path, dataclasses.replace(SPEC, name="other"))
    report = verify(tmp_path)
    assert report.samples == {"toy/train": 0, "other/train": 7, "other/test": 2}
    assert {problem.shard for problem in report.problems} == {SHARD}
    assert all(str(problem).isprintable() for problem in report.problems)


@pytest.mark.parametrize("end", [b"x", bytes(9000) + b"x", bytes(1 << 17), member("b.json")])
def test_bytes_after_the_end_of_the_tar(tmp_path: Path, end: bytes) -> None:
    _index(tmp_path, member("a.json", json.dumps(sample()).encode()) + bytes(1024) + end)
    assert _messages(verify(tmp_path)) == f"{SHARD}: has other bytes after the block that ends a tar file"


@pytest.mark.parametrize("blocks", [1, 2, tarfile.RECORDSIZE // 512])
def test_a_tar_ends_with_empty_blocks(tmp_path: Path, blocks: int) -> None:
    _index(tmp_path, member("a.json", json.dumps(sample()).encode()) + bytes(512 * blocks))
    assert verify(tmp_path).ok


@pytest.mark.parametrize("function", ["index.sha256_of", "validation.read_raw_samples"])
def test_a_shard_that_cannot_be_read(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> str:
        raise OSError(5, os.strerror(5))

    write_toy(tmp_path)
    monkeypatch.setattr(f"lvlm_clorae.data.{function}", fail)
    assert f"{SHARD}: cannot be read (Input/output error)" in _messages(verify(tmp_path))


def test_another_number_of_images(tmp_path: Path) -> None:
    write_toy(tmp_path)
    content = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    (entry,) = content["datasets"]["toy"]["splits"]["train"]
    entry["images"] -= 1
    (tmp_path / "index.json").write_text(json.dumps(content), encoding="utf-8")
    found = _messages(verify(tmp_path))
    assert found == f"{SHARD}: has {entry['images'] + 1} images, but the index has {entry['images']}"


def test_swapped_shards(tmp_path: Path) -> None:
    write_toy(tmp_path, max_samples=3)
    first, second = tmp_path / SHARD, tmp_path / "toy-train-000001.tar"
    (data, other) = (first.read_bytes(), second.read_bytes())
    first.write_bytes(other)
    second.write_bytes(data)
    assert _messages(verify(tmp_path)).count("SHA-256") == 2


def test_duplicate_shard(tmp_path: Path) -> None:
    write_toy(tmp_path, max_samples=1)
    (tmp_path / "toy-train-000001.tar").write_bytes((tmp_path / SHARD).read_bytes())
    assert "toy-train-000001.tar, 000000_toy: the key occurs twice" in _messages(verify(tmp_path))


def test_boxes_outside_their_image(tmp_path: Path) -> None:
    inside, rounded, outside = [0, 0, 20, 10], [1.0, 1.0, 22.0, 11.0], [2, 2, 22.5, 4]
    report = _write(tmp_path, (sample(image="a.png", boxes=[inside, rounded, outside]), pil_image(size=(20, 10))))
    assert report.boxes == 3
    assert _messages(report).startswith(f"{SHARD}, k0: O3 [2, 2, 22.5, 4] is 2.5 pixels outside the 20x10 image")
    assert len(report.problems) == 1


def test_boxes_of_a_missing_image_are_not_checked(tmp_path: Path) -> None:
    report = _write(tmp_path, (sample(image="a.png", boxes=[[0, 0, 9999, 9999]]), None))
    assert (report.ok, report.missing_images, report.boxes) == (True, 1, 1)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_undecodable_images(tmp_path: Path, image_format: str) -> None:
    whole = pil_image(image_format, (200, 200))
    report = _write(
        tmp_path,
        (sample(image="a"), whole),
        (sample(image="b"), whole[: len(whole) // 2]),
        (sample(image="c"), whole[:12] + bytes(40)),
    )
    assert [problem.key for problem in report.problems] == ["k1", "k2"]
    assert all("cannot be decoded" in problem.message for problem in report.problems)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("1", (300, 300)).save(buffer, "PNG")
    for limit in (50_000, 40_000):  # Pillow warns above its limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        report = _write(tmp_path / str(limit), (sample(image="a"), buffer.getvalue()))
        assert "too large" in _messages(report)


def test_samples_of_another_dataset_or_format(tmp_path: Path) -> None:
    report = _write(
        tmp_path,
        ({**sample(), "dataset": "other"}, None),
        ({**sample(), "entities": [{"type": "planet", "span": [0, 1], "text": "Anna"}]}, None),
        ({**sample(), "text": "something else"}, None),
        (sample(), pil_image()),
    )
    assert [problem.key for problem in report.problems] == ["k0", "k1", "k2", "k3"]
    for problem, named in zip(report.problems, ('"other"', 'entity "planet"', "text", '"image"'), strict=True):
        assert named in problem.message


def test_unknown_labels() -> None:
    events = [{"type": "Die", "trigger": None, "arguments": [{"role": "Victim", "object": "O1"}]}]
    labels = {"trigger": ["Die"], "argument": {"types": ["Die"], "roles": ["Agent"]}}
    assert unknown_labels({"task": "mee", "events": events}, labels) == ['argument "Victim"']
    assert unknown_labels({"task": "mre", "relation": {"label": "peer"}}, {"relation": ["none"]}) == ['relation "peer"']
    assert unknown_labels({"task": "mner", "entities": []}, {"entity": []}) == []


def test_annotations_of_other_tasks_are_not_read(tmp_path: Path) -> None:
    assert _write(tmp_path, ({**sample(), "events": 3, "relation": "none"}, None)).ok
