"""Reading shards: a tar's files as records, records as checked samples, nothing unbounded in memory."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from lvlm_clorae.data.index import INDEX_NAME, Index
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks.schema import check_sample

MAX_JSON_BYTES = 1 << 20
MAX_IMAGE_BYTES = 64 << 20
MAX_RECORD_BYTES = MAX_JSON_BYTES + MAX_IMAGE_BYTES + (64 << 10)
"""Both, and room for their headers and for the blocks of zeros that end a tar file."""
IMAGE_EXTENSIONS = ("jpg", "png", "webp")


class BadSample(UserError):
    """A sample, or its picture, that is not sound."""


def image_extension(data: bytes) -> str | None:
    """``jpg``, ``png`` or ``webp`` by the picture's first bytes, whatever its file was called; None for others."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


@dataclass(frozen=True)
class Record:
    """A sample as its files: `offset` is the byte, from where reading began, of the first one's header."""

    key: str
    offset: int
    json: bytes = field(repr=False)
    image: bytes | None = field(repr=False)


def read_records(handle: IO[bytes], where: str) -> Iterator[Record]:
    """The samples of a tar, from the byte at which `handle` stands (any sample's offset) to the end, unparsed.

    Only forward reads are used, so a pipe or an HTTP response does as well as a file. Raises BadSample, naming `where`
    and the key, for a member over the bounds, a picture without its JSON, files other than a sample's, and a tar that
    cannot be read. A tar whose headers are damaged simply ends early, as `tarfile` has it: count the samples.
    """
    return _records(_members(handle), where)


def parse_record(data: bytes, where: str) -> Record | None:
    """The sample at the beginning of `data`; None where the tar ends there. Raises BadSample as :func:`read_records`.

    For the bytes of one sample, which `tarfile` would read as a stream at a tenth of what its picture costs.
    """
    return next(_records(_members_of(data), where), None)


Member = tuple[tarfile.TarInfo, Callable[[], bytes]]


def _members(handle: IO[bytes]) -> Iterator[Member]:
    with tarfile.open(fileobj=handle, mode="r|") as tar:
        while (info := tar.next()) is not None:
            content = tar.extractfile(info)
            yield info, content.read if content else bytes
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header: memory would grow


def _members_of(data: bytes) -> Iterator[Member]:
    start = 0
    while start < len(data):
        header = data[start : start + tarfile.BLOCKSIZE]
        if not header.strip(b"\0"):
            return  # an empty block ends a tar
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        info.offset, first = start, start + tarfile.BLOCKSIZE
        yield info, partial(_part, data, first, first + info.size)
        start = first + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _part(data: bytes, start: int, stop: int) -> bytes:
    return data[start:stop]


def _records(members: Iterator[Member], where: str) -> Iterator[Record]:
    pending: Record | None = None
    try:
        for info, read in members:
            key, _, extension = info.name.partition(".")
            data = _content(info, read, f"{where}, {key}", extension)
            if extension == "json":
                if pending:
                    yield pending
                pending = Record(key, info.offset, data, None)
            elif pending is None or pending.key != key or pending.image is not None:
                raise BadSample(f"{where}, {key}: {info.name} does not follow its own .json file.")
            else:
                pending = Record(key, pending.offset, pending.json, data)
    except (tarfile.TarError, EOFError) as error:
        raise BadSample(f"{where}: cannot be read as a tar file ({error}). Copy it again; see shards verify.") from None
    if pending:
        yield pending


def _content(info: tarfile.TarInfo, read: Callable[[], bytes], where: str, extension: str) -> bytes:
    if not info.isreg() or extension not in ("json", *IMAGE_EXTENSIONS):
        raise BadSample(f"{where}: {info.name} is not a sample's .json, .jpg, .png or .webp file.")
    bound = MAX_JSON_BYTES if extension == "json" else MAX_IMAGE_BYTES
    if info.size > bound:
        raise BadSample(f"{where}: {info.name} has {info.size} bytes, more than the {bound} allowed.")
    data = read()
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name} is cut off")
    return data


def decode_sample(data: bytes, where: str) -> dict[str, Any]:
    """The sample of a record's JSON. Raises UserError, naming `where`, unless `check_sample` finds it sound."""
    try:
        sample: dict[str, Any] = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{where}: not valid JSON ({error}).") from None
    faults = check_sample(sample)
    if faults:
        raise BadSample(f"{where}: not a sound sample. {'; '.join(faults[:3])}.")
    return sample


def read_samples(
    directory: Path, index: Index, dataset: str, split: str
) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    """(key, sample, original picture bytes or None) of a split, in the order written; nothing for an absent split.

    Raises UserError for an unknown dataset and, naming shard and key, for what `read_records` and `decode_sample`
    refuse, and for a shard with fewer or more samples than the index says.
    """
    for shard in index.dataset(dataset).splits.get(split, ()):
        count = 0
        with open(directory / shard.name, "rb") as handle:
            for record in read_records(handle, shard.name):
                count += 1
                yield record.key, decode_sample(record.json, f"{shard.name}, {record.key}"), record.image
        if count != shard.samples:
            raise UserError(f"{shard.name}: has {count} samples where {INDEX_NAME} says {shard.samples}.")


def sha256_of(handle: IO[bytes]) -> str:
    """Hexadecimal SHA-256 of what is left to read in `handle`."""
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
