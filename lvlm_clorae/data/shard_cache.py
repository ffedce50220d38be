"""Local cache of whole remote shards, with a size limit, shared by all processes of a machine.

fsspec's caches verify no checksum, have no size limit, and let processes that want the same file each download it.
"""

import fcntl
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path

from lvlm_clorae.data.index import ShardEntry
from lvlm_clorae.data.storage import CommandStorage, FsspecStorage, LocalStorage
from lvlm_clorae.digests import sha256_of
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import atomic_path, file_errors


class ShardCache(LocalStorage):
    """A :class:`~lvlm_clorae.data.storage.ShardStorage` that downloads shards on first use.

    Files are named by the SHA-256 of their content and appear when they are complete and verified. One process
    downloads a shard while others that need it wait. Above ``max_bytes`` the least recently used shards are evicted; a
    process that has one of them open can still read it. A shard is downloaded even if it alone is larger.
    """

    def __init__(self, storage: FsspecStorage | CommandStorage, directory: Path, max_bytes: int) -> None:
        super().__init__(directory)
        self.name, self.max_bytes, self._storage = storage.name, max_bytes, storage
        self._downloaded: set[str] = set()

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        path = self.directory / f"{shard.sha256}.tar"
        with file_errors(f"{self.directory}: {shard.name} cannot be cached there"):
            with suppress(FileNotFoundError):  # evicted, perhaps while it is open here
                _mark_used(path)
            while True:
                try:
                    return self.read_file(path.name, start, stop)
                except FileNotFoundError:
                    self._ensure(shard, path)

    def _ensure(self, shard: ShardEntry, path: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / f".{shard.sha256}.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return
            if shard.sha256 in self._downloaded:
                warnings.warn(
                    f"{self.directory}: {shard.name} is downloaded again, because the shards read at the same time "
                    f"exceed the limit of {self.max_bytes / 2**30:.1f} GiB. Raise it with --cache_gib.",
                    stacklevel=2,
                )
            self._download(shard, path)
            self._downloaded.add(shard.sha256)
            with open(self.directory / ".eviction.lock", "ab") as eviction_lock:
                fcntl.flock(eviction_lock, fcntl.LOCK_EX)
                self._evict(newest=path)

    def _download(self, shard: ShardEntry, path: Path) -> None:
        for abandoned in self.directory.glob(f".{path.name}.*.partial"):  # by a process that was killed
            abandoned.unlink()
        with atomic_path(path) as partial:
            self._storage.download(shard, partial)
            with open(partial, "rb") as handle:
                if sha256_of(handle) != shard.sha256:
                    raise UserError(
                        f"{self.name}: {shard.name} has {handle.tell()} bytes or a SHA-256 other than the index says "
                        f"({shard.bytes} bytes). Upload shards and index again."
                    )
            _mark_used(partial)

    def _evict(self, newest: Path) -> None:
        """Remove the least recently used shards, but not the newest."""
        files = []
        for path in self.directory.glob("*.tar"):
            with suppress(FileNotFoundError):  # another program cleans the directory
                files.append((path.stat(), path))
        total = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total > self.max_bytes and path != newest:
                path.unlink(missing_ok=True)
                total -= status.st_size


def _mark_used(path: Path) -> None:
    now = time.time_ns()  # the file system's clock ticks in milliseconds, too coarse to order uses
    os.utime(path, ns=(now, now))
