"""Whole shards of remote places, kept in a local directory up to a bound, shared by all processes of a machine."""

from __future__ import annotations

import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lvlm_clorae.data.index import ShardEntry
from lvlm_clorae.data.reader import sha256_of
from lvlm_clorae.data.sources import LocalSource, Source
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import atomic_path


class ShardCache:
    """Files named by the SHA-256 of their content, the least recently used of which go when there is no more room.

    A shard is fetched by one process while the others that want it wait, and appears when it is whole and its sum is
    right. One that is removed while somebody reads it stays readable for them.

    Args:
        directory: made where it is missing
        max_bytes: of all files in it; a shard that is needed is fetched even where it alone is larger
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self._fetched: set[str] = set()

    def fetch(self, source: Source, shard: ShardEntry) -> None:
        """See that the shard's file is there. Raises UserError as the source, and for other bytes than the index's."""
        path = self.directory / self.file_name(shard)
        try:
            with suppress(FileNotFoundError):
                return _mark_used(path)
            self.directory.mkdir(parents=True, exist_ok=True)
            with _locked(self.directory / f".{shard.sha256}.lock"):
                if not path.exists():
                    self._fetch(source, shard, path)
        except OSError as error:
            raise UserError(f"{self.directory}: {shard.name} cannot be kept there ({error.strerror}).") from None

    @staticmethod
    def file_name(shard: ShardEntry) -> str:
        return f"{shard.sha256}.tar"

    def _fetch(self, source: Source, shard: ShardEntry, path: Path) -> None:
        if shard.sha256 in self._fetched:
            warnings.warn(
                f"{self.directory}: {shard.name} is fetched again, for the {self.max_bytes / 2**30:.1f} GiB allowed do "
                "not hold the shards that are read at the same time. Allow more with --cache-gib.",
                stacklevel=2,
            )
        self._fetched.add(shard.sha256)
        with atomic_path(path) as partial, open(partial, "wb+") as handle:
            source.copy(shard.name, handle, shard.bytes)
            size = handle.tell()
            handle.seek(0)
            if size != shard.bytes or sha256_of(handle) != shard.sha256:
                raise UserError(
                    f"{source.name}: {shard.name} has {size} bytes where the index says {shard.bytes}, or another "
                    "SHA-256. Upload shards and index again."
                )
            _mark_used(partial)
        with _locked(self.directory / ".room.lock"):
            self._make_room(path)

    def _make_room(self, kept: Path) -> None:
        files = []
        for path in self.directory.glob("*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((path == kept, status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, _, size, _ in files)
        for newest, _, size, path in sorted(files):
            if total <= self.max_bytes or newest:
                return
            path.unlink(missing_ok=True)
            (self.directory / f".{path.stem}.lock").unlink(missing_ok=True)
            total -= size


def _mark_used(path: Path) -> None:
    now = time.time_ns()  # the file system's own clock ticks in milliseconds: uses within one tick would be equally old
    os.utime(path, ns=(now, now))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class CachedSource:
    """A remote source, read from the files of a cache."""

    concurrent = 1

    def __init__(self, source: Source, cache: ShardCache) -> None:
        self.name, self._source, self._cache = source.name, source, cache
        self._files = LocalSource(cache.directory)

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        """See :class:`~lvlm_clorae.data.sources.Source`."""
        name = self._cache.file_name(shard)
        while True:
            if not self._files.has_open(name):
                self._cache.fetch(self._source, shard)
            with suppress(FileNotFoundError):  # another process made room in between
                return self._files.read_file(name, start, stop)

    def copy(self, name: str, handle: IO[bytes], max_bytes: int) -> None:
        """See :class:`~lvlm_clorae.data.sources.Source`."""
        self._source.copy(name, handle, max_bytes)
