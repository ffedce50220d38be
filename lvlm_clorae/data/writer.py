"""Write shards: WebDataset tar files whose bytes depend on their samples alone (docs/data.md).

A sample is ``<key>.json`` and, if it has an image, ``<key>.jpg|png|webp`` with the original bytes. Samples are
contiguous in ``<dataset>-<split>-%06d.tar``, and index.json says where each one starts.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import tarfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lvlm_clorae.data.index import INDEX_NAME, SPLITS, DatasetEntry, DatasetSpec, Index, ShardEntry, load_index
from lvlm_clorae.data.reader import KEY, MAX_IMAGE_BYTES, MAX_JSON_BYTES, image_extension
from lvlm_clorae.digests import sha256_of
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import file_errors, write_text_atomic


class ShardWriter:
    """Write one dataset into a directory of shards, completely or not at all.

        with ShardWriter(directory, spec) as writer:
            writer.add("train", "000001", sample, image)

    Shards are written in a hidden directory beside ``directory``. At the end of the block they are renamed into place,
    and index.json, which makes them visible, comes last; if the block raises, everything is removed. What a killed
    process leaves behind is hidden, and is removed by the next build into the same directory.

    Args:
        max_samples, max_bytes: limits of a shard; a single larger sample gets a shard of its own

    Raises:
        UserError: on entering, if the directory already has the dataset, has a broken index, is being written by
            another build or cannot be written; on leaving, if no sample was added.
    """

    def __init__(
        self, directory: Path, spec: DatasetSpec, *, max_samples: int = 500, max_bytes: int = 256 << 20
    ) -> None:
        if max_samples < 1 or max_bytes < 1:
            raise UserError("A shard needs at least one sample and one byte. Raise max_samples or max_bytes.")
        self.directory, self.spec, self.max_samples, self.max_bytes = directory, spec, max_samples, max_bytes
        # A rename cannot leave a file system, so a mount point gets the hidden directory inside.
        absolute = directory.absolute()
        self._partial = (absolute if absolute.is_mount() else absolute.parent) / f".{absolute.name}.partial"
        self._open: dict[str, _Shard] = {}
        self._done: dict[str, list[ShardEntry]] = {}
        self._keys: set[tuple[str, str]] = set()

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            self._take_over_partial(stack)
            has_index = (self.directory / INDEX_NAME).exists()
            self._existing = load_index(self.directory).datasets if has_index else {}
            if self.spec.name in self._existing:
                raise UserError(
                    f'{self.directory}: dataset "{self.spec.name}" is already there, and shards are never overwritten. '
                    "Choose another output directory, or remove this one first."
                )
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._cleanup:
            if kind is None:
                for split in list(self._open):
                    self._close(split)
                self._publish()
            for shard in self._open.values():
                with suppress(OSError):  # a full disk may be the reason for closing
                    shard.tar.close()

    def add(self, split: str, key: str, sample: dict[str, Any], image: bytes | None = None) -> None:
        """Append one sample. Raises UserError, before anything is written, if it does not fit the format."""
        if split not in SPLITS:
            raise UserError(f'{key}: there is no split "{split}". Splits: {", ".join(SPLITS)}.')
        if not KEY.fullmatch(key):
            raise UserError(f'"{key}" cannot be a key: letters, digits, "_" and "-" only, at most 90.')
        if (split, key) in self._keys:
            raise UserError(f'Two samples of split "{split}" have the key "{key}".')
        members = _members(key, sample, image)
        size = sum(tarfile.BLOCKSIZE + _padded(len(data), tarfile.BLOCKSIZE) for _, data in members)
        shard = self._open.get(split)
        if shard and (len(shard.offsets) >= self.max_samples or _file_size(shard.tar.offset + size) > self.max_bytes):
            self._close(split)
        if split not in self._open:
            name = f"{self.spec.name}-{split}-{len(self._done.get(split, ())):06d}.tar"
            self._open[split] = _Shard(self._partial / name)
        self._keys.add((split, key))
        self._open[split].append(members)

    def _take_over_partial(self, stack: ExitStack) -> None:
        """Create and lock the hidden directory, and remove what a killed build left in it."""
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory}: is a file, but shards need a directory. Choose another output.")
        with file_errors(f"{self._partial}: cannot be created", "Choose another output."):
            self._partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._partial / "lock", os.O_CREAT | os.O_RDWR)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink == 0:
                raise BlockingIOError  # the other build removed the lock's directory between our open and our lock
        except BlockingIOError:
            raise UserError(f"{self.directory}: another build is writing into it. Wait until it is done.") from None
        stack.callback(shutil.rmtree, self._partial, ignore_errors=True)
        for left in self._partial.glob("*.tar"):
            left.unlink()

    def _close(self, split: str) -> None:
        self._done.setdefault(split, []).append(self._open.pop(split).finish())

    def _publish(self) -> None:
        if not self._done:
            raise UserError(f'No sample of "{self.spec.name}" was written. Check the input directory.')
        splits = {split: tuple(self._done[split]) for split in SPLITS if split in self._done}
        datasets = {**self._existing, self.spec.name: DatasetEntry(**vars(self.spec), splits=splits)}
        index = Index(dict(sorted(datasets.items())))
        names = [shard.name for shards in splits.values() for shard in shards]
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self._partial / INDEX_NAME, index.to_json())
        with ExitStack() as undo:
            for name in [*names, INDEX_NAME]:
                os.replace(self._partial / name, self.directory / name)
                undo.callback((self.directory / name).unlink)
            undo.pop_all()


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _file_size(content: int) -> int:
    """Return the size of a tar: it ends with two empty blocks and fills its last record."""
    return _padded(content + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def _members(key: str, sample: dict[str, Any], image: bytes | None) -> list[tuple[str, bytes]]:
    """Return name and bytes of a sample's files. Raises UserError if a reader would reject them."""
    try:
        data = json.dumps(sample, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: the sample cannot be written as JSON ({error}).") from None
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{key}: its JSON has {len(data)} bytes, more than the {MAX_JSON_BYTES} allowed.")
    if image is None:
        return [(f"{key}.json", data)]
    extension = image_extension(image)
    if extension is None:
        raise UserError(f"{key}: its image is not a JPEG, PNG or WebP file.")
    if len(image) > MAX_IMAGE_BYTES:
        raise UserError(f"{key}: its image has {len(image)} bytes, more than the {MAX_IMAGE_BYTES} allowed.")
    return [(f"{key}.json", data), (f"{key}.{extension}", image)]


class _Shard:
    """A shard being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by finish
        self.offsets: list[int] = []
        self.images = 0

    def append(self, members: list[tuple[str, bytes]]) -> None:
        self.offsets.append(self.tar.offset)
        self.images += len(members) > 1
        for name, data in members:
            info = tarfile.TarInfo(name)  # owner, group and time are 0 or empty by default, so bytes stay the same
            info.size, info.mode = len(data), 0o644
            self.tar.addfile(info, io.BytesIO(data))
        self.tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header: memory would grow

    def finish(self) -> ShardEntry:
        self.tar.close()
        with open(self.path, "rb") as handle:
            os.fsync(handle.fileno())
            digest = sha256_of(handle)
            return ShardEntry(self.path.name, len(self.offsets), handle.tell(), digest, self.offsets, self.images)
