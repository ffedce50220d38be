"""SHA256SUMS: the digests of a directory's files, in the format of ``sha256sum``, checked before the files are read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lvlm_clorae.files import write_text_atomic

DIGESTS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\0]+)")


def sha256_of(handle: IO[bytes]) -> str:
    """Return the hexadecimal SHA-256 of the rest of ``handle``."""
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def write_digests(directory: Path) -> None:
    """Write ``SHA256SUMS`` for the files of a directory, which has no folders."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file() and path.name != DIGESTS)
    lines = []
    for name in names:
        with open(directory / name, "rb") as handle:
            lines.append(f"{sha256_of(handle)}  {name}\n")
    write_text_atomic(directory / DIGESTS, "".join(lines))


def check_digests(directory: Path, may_differ: Sequence[str] = ()) -> list[str]:
    """Check every file that ``SHA256SUMS`` lists, and return those of ``may_differ`` that have other content.

    Raises:
        ValueError: ``SHA256SUMS`` is missing or malformed, a file is missing or has other content, or there is one that
            is not listed (hidden ones apart) or that is a link to outside the directory.
        OSError: a file cannot be read.
    """
    path = directory / DIGESTS
    if not path.is_file():
        raise ValueError(f"{DIGESTS} is missing")
    *lines, end = path.read_text(encoding="utf-8").split("\n")
    found = [_LINE.fullmatch(line) for line in lines]
    if not found or None in found or end:
        raise ValueError(f"{DIGESTS} is malformed")
    listed = {match.group(2) for match in found if match} | {DIGESTS, *may_differ}
    real = directory.resolve()
    inside = {real, real.parent.parent / "blobs"}  # the latter in the cache of the hub, where all files are links
    for file in sorted(directory.iterdir()):
        if not file.name.startswith(".") and not (file.is_dir() or file.name in listed):
            raise ValueError(f"{file.name} is not listed in {DIGESTS}")
        if file.is_symlink() and file.resolve().parent not in inside:
            raise ValueError(f"{file.name} is a link to a file outside the directory")
    different = []
    for match in filter(None, found):
        digest, name = match.groups()
        if not (directory / name).is_file():
            raise ValueError(f"{name} is missing")
        with open(directory / name, "rb") as handle:
            equal = sha256_of(handle) == digest
        if not equal and name not in may_differ:
            raise ValueError(f"{name} differs from its digest in {DIGESTS}: its bytes have changed")
        different += [] if equal else [name]
    return different
