"""Read shards: the files of a tar as raw samples, raw samples as checked samples, all within memory bounds."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from lvlm_clorae.data.index import INDEX_NAME, Index, ShardEntry
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import file_errors, parse_json
from lvlm_clorae.tasks.schema import check_sample

if TYPE_CHECKING:
    from lvlm_clorae.data.storage import ShardStorage

MAX_JSON_BYTES = 1 << 20
MAX_IMAGE_BYTES = 64 << 20
MAX_END_BYTES = 64 << 10
"""Empty blocks after the one that ends a tar file."""
MAX_SAMPLE_BYTES = MAX_JSON_BYTES + MAX_IMAGE_BYTES + 5 * tarfile.BLOCKSIZE + MAX_END_BYTES
"""JSON and image with their headers and padding, and the empty blocks that end a tar file."""
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
# WebDataset ends the key at the first dot, makes folders part of it, and skips names that begin with "__".
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,89}")
_VERIFY = "Check the shards with: lvlm-clorae shards verify"


class InvalidSample(UserError):
    """A sample, or its image, is invalid."""


def image_extension(data: bytes) -> str | None:
    """Return ``jpg``, ``png`` or ``webp`` by the first bytes of an image, whatever its file name; None for others."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


class RawSample(NamedTuple):
    """The files of a sample; ``offset`` is the byte of its first header, from where reading began."""

    key: str
    offset: int
    json: bytes
    image: bytes | None


def read_raw_samples(handle: IO[bytes], where: str) -> Iterator[RawSample]:
    """Yield the samples of a tar, unparsed, from the position of ``handle`` (the offset of any sample) to the end.

    Reads forward only, so ``handle`` may be a pipe. ``tarfile`` itself would take ten times as long for one sample.

    Raises:
        InvalidSample: a member exceeds the size bounds or does not belong to a sample, or the tar cannot be read. The
            message names ``where`` and the key.
    """
    pending: RawSample | None = None
    for key, extension, offset, data in _members(handle, where):
        if extension == "json":
            if pending:
                yield pending
            pending = RawSample(key, offset, data, None)
        elif pending is None or pending.key != key or pending.image is not None:
            raise InvalidSample(f"{where}, {key}: {key}.{extension} does not follow its own .json file. {_VERIFY}")
        else:
            pending = pending._replace(image=data)
    if pending:
        yield pending


def _members(handle: IO[bytes], where: str) -> Iterator[tuple[str, str, int, bytes]]:
    """Yield key, extension, offset and content of each file of a tar."""
    offset = 0
    while (header := handle.read(tarfile.BLOCKSIZE)).strip(b"\0"):  # an empty block ends a tar
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise InvalidSample(f"{where}: is not a tar file at byte {offset} ({error}). Copy it again.") from None
        name = info.name if info.name.isprintable() else ascii(info.name)
        key, _, extension = name.partition(".")
        # Not isreg(), which includes sparse files, whose data are not their content.
        is_plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and KEY.fullmatch(key)
        if not is_plain or extension not in ("json", *IMAGE_EXTENSIONS):
            raise InvalidSample(f"{where}, {key}: {name} is not a plain .json, .jpg, .png or .webp file. {_VERIFY}")
        bound = MAX_JSON_BYTES if extension == "json" else MAX_IMAGE_BYTES
        if not 0 <= info.size <= bound:
            raise InvalidSample(f"{where}, {key}: {name} has {info.size} bytes, not 0 to the {bound} allowed.")
        data, padding = handle.read(info.size), -info.size % tarfile.BLOCKSIZE
        if len(data) != info.size:
            raise InvalidSample(f"{where}, {key}: {name} is truncated. Copy the shard again.")
        yield key, extension, offset, data
        offset += tarfile.BLOCKSIZE + info.size + len(handle.read(padding))


def decode_sample(data: bytes, where: str) -> dict[str, Any]:
    """Decode and check the JSON of a sample. Raises InvalidSample, naming ``where``."""
    try:
        sample: dict[str, Any] = parse_json(data)
    except ValueError as error:
        raise InvalidSample(f"{where}: not valid JSON ({error}). Rebuild the shard.") from None
    if faults := check_sample(sample):
        raise InvalidSample(f"{where}: not a valid sample. {'; '.join(faults[:3])}.")
    return sample


def read_sample(storage: ShardStorage, shard: ShardEntry, number: int) -> tuple[str, dict[str, Any], bytes | None]:
    """Return key, sample and image bytes (or None) of one sample of a shard, read at its offset in the index.

    Raises InvalidSample, naming shard and key, if the sample is invalid; UserError if the shard cannot be read.
    """
    start, stop = [*shard.offsets[number : number + 2], shard.bytes][:2]
    if stop - start > MAX_SAMPLE_BYTES:
        raise InvalidSample(
            f"{shard.name}: {INDEX_NAME} gives the sample at byte {start} {stop - start} bytes, more than the "
            f"{MAX_SAMPLE_BYTES} allowed. {_VERIFY}"
        )
    found = [*read_raw_samples(io.BytesIO(storage.read(shard, start, stop)), shard.name)]
    if len(found) != 1:
        raise InvalidSample(
            f"{shard.name}: {len(found)} samples at byte {start}, where {INDEX_NAME} has one. {_VERIFY}"
        )
    (raw,) = found
    return raw.key, decode_sample(raw.json, f"{shard.name}, {raw.key}"), raw.image


def read_samples(
    directory: Path, index: Index, dataset: str, split: str
) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    """Yield key, sample and original image bytes (or None) of a split in the order written; nothing if it is absent.

    Raises UserError if the dataset is unknown, a sample is invalid, or a shard cannot be read or has another number of
    samples than the index says.
    """
    for shard in index.dataset(dataset).splits.get(split, ()):
        count = 0
        path = directory / shard.name
        with file_errors(f"{path}: cannot be read"), open(path, "rb") as handle:
            for raw in read_raw_samples(handle, shard.name):
                count += 1
                yield raw.key, decode_sample(raw.json, f"{shard.name}, {raw.key}"), raw.image
        if count != shard.samples:
            raise UserError(f"{shard.name}: has {count} samples where {INDEX_NAME} says {shard.samples}. {_VERIFY}")
