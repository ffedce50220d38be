"""Reading shards: from any offset, within bounds, and every fault named with shard and key."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from lvlm_clorae.data.reader import BadSample, parse_record
from lvlm_clorae.data.shards import load_index, read_records, read_samples
from lvlm_clorae.errors import UserError

from .helpers import samples, write_toy


def test_reading_can_start_at_any_offset(tmp_path: Path) -> None:
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    keys = [key for key, _, _ in samples(7)]
    for number, offset in enumerate(shard.offsets):
        with open(tmp_path / shard.name, "rb") as handle:
            handle.seek(offset)
            assert [record.key for record in read_records(handle, shard.name)] == keys[number:]


def _tar(*members: tuple[str, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.json", bytes((1 << 20) + 1))], "s.tar, k: k.json has .* more than"),
        ([("k.json", b"{}"), ("k.jpg", bytes((64 << 20) + 1))], "s.tar, k: k.jpg has .* more than"),
        ([("k.jpg", b"")], "s.tar, k: k.jpg does not follow"),
        ([("k.json", b"{}"), ("other.jpg", b"")], "s.tar, other: other.jpg does not follow"),
        ([("k.json", b"{}"), ("k.jpg", b""), ("k.png", b"")], "s.tar, k: k.png does not follow"),
        ([("k.txt", b"")], "s.tar, k: k.txt is not a sample's"),
        ([("k", b"")], "s.tar, k: k is not a sample's"),
    ],
)
def test_a_tar_of_another_layout_is_refused(members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_records(_tar(*members), "s.tar"))


def test_bytes_that_are_no_tar_are_refused() -> None:
    for data in (b"", b"not a tar", _tar(("k.json", b"x" * 900)).getvalue()[:1000]):
        with pytest.raises(UserError, match=r"s\.tar: cannot be read as a tar"):
            list(read_records(io.BytesIO(data), "s.tar"))


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"[]", b'{"text": "a"}', b"1" * 5000])
def test_json_that_is_no_sample_is_named_with_shard_and_key(tmp_path: Path, data: bytes) -> None:
    index = write_toy(tmp_path, counts=(("train", 1),))
    (tmp_path / "toy-train-000000.tar").write_bytes(_tar(("bad_key.json", data)).getvalue())
    with pytest.raises(UserError, match=r"toy-train-000000\.tar, bad_key: not "):
        list(read_samples(tmp_path, index, "toy", "train"))


def test_a_shard_that_lost_samples_is_an_error_when_read(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    shard = tmp_path / "toy-train-000000.tar"
    data = bytearray(shard.read_bytes())
    start = index.dataset("toy").splits["train"][0].offsets[3]
    data[start : start + 512] = b"\xee" * 512
    shard.write_bytes(data)
    with pytest.raises(UserError, match="has 3 samples where"):
        list(read_samples(tmp_path, load_index(tmp_path), "toy", "train"))


def test_a_sample_alone_is_what_the_whole_tar_gives(tmp_path: Path) -> None:
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    data = (tmp_path / shard.name).read_bytes()
    together = list(read_records(io.BytesIO(data), shard.name))
    for record, start, stop in zip(together, shard.offsets, [*shard.offsets[1:], shard.bytes], strict=True):
        alone = parse_record(data[start:stop], shard.name)
        assert alone == replace(record, offset=0)
        assert parse_record(data[start:], shard.name) == alone, "whatever follows it"
    assert parse_record(bytes(1024), "x") is None
    assert parse_record(b"", "x") is None


@pytest.mark.parametrize("cut", [100, 512, 600, 1030])
def test_a_sample_that_is_cut_off_is_bad(tmp_path: Path, cut: int) -> None:
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    data = (tmp_path / shard.name).read_bytes()[:cut]
    with pytest.raises(BadSample, match=rf"{shard.name}: cannot be read as a tar"):
        parse_record(data, shard.name)
