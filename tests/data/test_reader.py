"""Reading shards: from any offset, within bounds, and every fault named with shard and key."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.index import load_index
from lvlm_clorae.data.reader import MAX_IMAGE_BYTES, MAX_JSON_BYTES, InvalidSample, read_raw_samples, read_samples
from lvlm_clorae.errors import UserError
from tests.helpers.shards import samples, write_toy


def make_tar(*members: tuple[str, bytes], form: int = tarfile.USTAR_FORMAT) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def test_reading_can_start_at_any_offset(tmp_path: Path) -> None:
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    keys = [key for key, _, _ in samples(7)]
    for number, offset in enumerate(shard.offsets):
        with open(tmp_path / shard.name, "rb") as handle:
            handle.seek(offset)
            read = list(read_raw_samples(handle, shard.name))
        assert [raw.key for raw in read] == keys[number:]
        assert [offset + raw.offset for raw in read] == list(shard.offsets[number:])


def test_a_sample_alone_is_the_one_in_the_whole_tar(tmp_path: Path) -> None:
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    data = (tmp_path / shard.name).read_bytes()
    together = list(read_raw_samples(io.BytesIO(data), shard.name))
    for raw, start, stop in zip(together, shard.offsets, [*shard.offsets[1:], shard.bytes], strict=True):
        assert list(read_raw_samples(io.BytesIO(data[start:stop]), shard.name)) == [raw._replace(offset=0)]
    for empty in (b"", bytes(1024)):
        assert list(read_raw_samples(io.BytesIO(empty), "x")) == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_are_read_as_tarfile_reads_them(form: int) -> None:
    members = [("a.json", b"{}"), ("b.json", b"x" * 513), ("b.jpg", bytes(range(256)) * 5), ("c.json", b"")]
    read = list(read_raw_samples(make_tar(*members, form=form), "s.tar"))
    assert [(raw.key, raw.json, raw.image) for raw in read] == [
        ("a", b"{}", None),
        ("b", b"x" * 513, bytes(range(256)) * 5),
        ("c", b"", None),
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.json", bytes(MAX_JSON_BYTES + 1))], f"s.tar, k: k.json .*{MAX_JSON_BYTES}"),
        ([("k.json", b"{}"), ("k.jpg", bytes(MAX_IMAGE_BYTES + 1))], f"s.tar, k: k.jpg .*{MAX_IMAGE_BYTES}"),
        ([("k.jpg", b"")], "s.tar, k: k.jpg"),
        ([("k.json", b"{}"), ("other.jpg", b"")], "s.tar, other: other.jpg"),
        ([("k.json", b"{}"), ("k.jpg", b""), ("k.png", b"")], "s.tar, k: k.png"),
        ([("k.txt", b"")], "s.tar, k: k.txt"),
        ([("k", b"")], "s.tar, k: k "),
    ],
)
def test_a_tar_of_another_layout_is_rejected(members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        list(read_raw_samples(make_tar(*members), "s.tar"))


def member(name: str = "k.json", data: bytes = b"{}", form: int = tarfile.USTAR_FORMAT, **fields: Any) -> bytes:
    """Return one member of a tar whose header has these fields; the header's size is that of ``data`` unless given."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form, errors="surrogateescape") + data + bytes(-len(data) % 512)


def negative_size() -> bytes:
    """Return a member whose size is -5, in base 256: ``read(-5)`` would read the whole tar."""
    header = bytearray(member(form=tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\xfb"
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header[:512]))[0]
    return bytes(header)


HOSTILE = {
    "PAX sparse": member(pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "k.json"}, form=tarfile.PAX_FORMAT),
    "GNU sparse": member(type=tarfile.GNUTYPE_SPARSE),
    "symlink": member(data=b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member(data=b"", type=tarfile.LNKTYPE, linkname="k.json"),
    "device": member(data=b"", type=tarfile.CHRTYPE),
    "directory": member(data=b"", type=tarfile.DIRTYPE),
    "absolute name": member("/etc/k.json"),
    "parent's name": member("../k.json"),
    "name in a folder": member("folder/k.json"),
    "name that is not UTF-8": member("k\udcff.json"),
    "name of two lines": member("k\nerror.json"),
    "no name": member(""),
    "no key": member(".json"),
    "huge size": member(size=1 << 62, form=tarfile.GNU_FORMAT),
    "negative size": negative_size(),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_member_is_one_line(data: bytes) -> None:
    with pytest.raises(InvalidSample, match=r"^s\.tar") as caught:
        list(read_raw_samples(io.BytesIO(member("a.json") + data + bytes(1024)), "s.tar"))
    assert str(caught.value).isprintable()


def test_bytes_that_are_no_tar_are_rejected() -> None:
    for data in (b"not a tar", make_tar(("k.json", b"x" * 900)).getvalue()[:1000]):
        with pytest.raises(InvalidSample, match=r"^s\.tar"):
            list(read_raw_samples(io.BytesIO(data), "s.tar"))


@pytest.mark.parametrize("cut", [100, 512, 600, 1030])
def test_a_truncated_sample_is_invalid(tmp_path: Path, cut: int) -> None:
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    data = (tmp_path / shard.name).read_bytes()[:cut]
    with pytest.raises(InvalidSample, match=shard.name):
        list(read_raw_samples(io.BytesIO(data), shard.name))


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"[]", b'{"text": "a"}', b"1" * 5000])
def test_invalid_json_is_named_with_shard_and_key(tmp_path: Path, data: bytes) -> None:
    index = write_toy(tmp_path, counts=(("train", 1),))
    (tmp_path / "toy-train-000000.tar").write_bytes(make_tar(("bad_key.json", data)).getvalue())
    with pytest.raises(InvalidSample, match=r"toy-train-000000\.tar, bad_key: not "):
        list(read_samples(tmp_path, index, "toy", "train"))


def test_a_shard_that_lost_samples_is_an_error(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    shard = tmp_path / "toy-train-000000.tar"
    data = shard.read_bytes()
    start = index.dataset("toy").splits["train"][0].offsets[3]
    for damaged in (b"", data[:start], data[:start] + bytes(len(data) - start)):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{shard.name}.* {3 if damaged else 0} samples"):
            list(read_samples(tmp_path, load_index(tmp_path, check_files=False), "toy", "train"))
    shard.write_bytes(data[:start] + b"\xee" * 512 + data[start + 512 :])
    with pytest.raises(InvalidSample, match=f"{shard.name}.* byte {start}"):
        list(read_samples(tmp_path, index, "toy", "train"))
