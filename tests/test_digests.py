"""SHA256SUMS: equal to what ``sha256sum`` writes and checks, and every change of a file is noticed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lvlm_clorae.digests import DIGESTS, check_digests, write_digests


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, data in {"a.json": b"{}", "b c.safetensors": bytes(3 << 20), "empty": b""}.items():
        (tmp_path / name).write_bytes(data)
    write_digests(tmp_path)
    return tmp_path


def test_sha256sum_accepts_the_file(directory: Path) -> None:
    assert check_digests(directory) == []
    subprocess.run(["sha256sum", "--check", "--strict", DIGESTS], cwd=directory, check=True, capture_output=True)
    before = (directory / DIGESTS).read_bytes()
    write_digests(directory)
    assert (directory / DIGESTS).read_bytes() == before


@pytest.mark.parametrize("name", ["a.json", "b c.safetensors", DIGESTS])
def test_every_flipped_bit_is_noticed(directory: Path, name: str) -> None:
    whole = (directory / name).read_bytes()
    for byte in {0, len(whole) // 3, len(whole) - 1}:
        for bit in range(8):
            data = bytearray(whole)
            data[byte] ^= 1 << bit
            (directory / name).write_bytes(data)
            with pytest.raises(ValueError, match=rf"{DIGESTS}|missing|UTF-8|utf-8"):
                check_digests(directory)
    (directory / name).write_bytes(whole)
    check_digests(directory)


def test_a_file_that_may_differ_is_named(directory: Path) -> None:
    (directory / "a.json").write_text("[]")
    assert check_digests(directory, may_differ=["a.json", "empty"]) == ["a.json"]


@pytest.mark.parametrize("name", ["a.json", "empty", DIGESTS])
def test_a_missing_file_is_noticed(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        check_digests(directory)


def test_paths_outside_the_directory_are_refused(directory: Path) -> None:
    line = (directory / DIGESTS).read_text().splitlines()[0].replace("a.json", "../a.json")
    (directory / DIGESTS).write_text(line + "\n")
    with pytest.raises(ValueError, match="malformed"):
        check_digests(directory)
