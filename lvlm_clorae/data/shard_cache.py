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

    Files are named by the SHA-256 of their content and appear when they are complete and verified. Each has a lock
    file with its size and time of modification when it was verified, which is itself modified at each use. A file whose
    size or time has changed is verified again, and downloaded again if its bytes have changed.

    One process downloads a shard while others that need it wait. Above ``max_bytes`` the least recently used shards are
    evicted; a process that has one of them open can still read it. A shard is downloaded even if it alone is larger.
    """

    def __init__(self, storage: FsspecStorage | CommandStorage, directory: Path, max_bytes: int) -> None:
        super().__init__(directory)
        self.name, self.max_bytes, self._storage = storage.name, max_bytes, storage
        self._downloaded: set[str] = set()
        self._verified: dict[str, str] = {}

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        path = self.directory / f"{shard.sha256}.tar"
        with file_errors(f"{self.directory}: {shard.name} cannot be cached there"):
            while True:
                version = _version(path)
                is_verified = version == self._verified.get(path.name) if version else path.name in self._open
                with suppress(FileNotFoundError):  # the file has just been evicted, or the lock file removed
                    if is_verified:
                        _mark_used(_lock_file(path))
                        return self.read_file(path.name, start, stop)
                self._ensure(shard, path)

    def _ensure(self, shard: ShardEntry, path: Path) -> None:
        """Let a verified file be at ``path``. Raises UserError if what is downloaded has other bytes, twice."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(_lock_file(path), "a+", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if opened := self._open.pop(path.name, None):
                opened.close()
            lock.seek(0)
            if not path.exists() or (lock.read() != _version(path) and not _is_intact(path, shard.sha256)):
                self._fetch(shard, path)
            self._verified[path.name] = _version(path)
            lock.truncate(0)
            lock.write(self._verified[path.name])

    def _fetch(self, shard: ShardEntry, path: Path) -> None:
        reason = "its bytes have changed" if path.exists() else ""
        if shard.sha256 in self._downloaded and not reason:
            reason = (
                f"the shards read at the same time exceed the limit of {self.max_bytes / 2**30:.1f} GiB. "
                "Raise it with --cache_gib"
            )
        if reason:
            warnings.warn(f"{self.directory}: {shard.name} is downloaded again: {reason}.", stacklevel=2)
        self._download(shard, path)
        self._downloaded.add(shard.sha256)
        with open(self.directory / ".eviction.lock", "ab") as eviction_lock:
            fcntl.flock(eviction_lock, fcntl.LOCK_EX)
            self._evict(newest=path)

    def _download(self, shard: ShardEntry, path: Path) -> None:
        for abandoned in self.directory.glob(f".{path.name}.*.partial"):  # by a process that was killed
            abandoned.unlink()
        with atomic_path(path) as partial:
            for _ in range(2):
                self._storage.download(shard, partial)
                if _is_intact(partial, shard.sha256):
                    return
            raise UserError(
                f"{self.name}: {shard.name} has {partial.stat().st_size} bytes or a SHA-256 other than the index says "
                f"({shard.bytes} bytes). Upload shards and index again."
            )

    def _evict(self, newest: Path) -> None:
        """Remove the least recently used shards, but not the newest."""
        files = []
        for path in self.directory.glob("*.tar"):
            with suppress(FileNotFoundError):  # another program cleans the directory
                files.append((_lock_file(path).stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total > self.max_bytes and path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")


def _version(path: Path) -> str:
    """Return what changes when a file is written: its size and time of modification; empty without the file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_intact(path: Path, sha256: str) -> bool:
    try:
        with open(path, "rb") as handle:
            return sha256_of(handle) == sha256
    except FileNotFoundError:  # evicted
        return False


def _mark_used(path: Path) -> None:
    now = time.time_ns()  # the file system's clock ticks in milliseconds, too coarse to order uses
    os.utime(path, ns=(now, now))
