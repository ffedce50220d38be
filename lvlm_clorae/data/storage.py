"""Storage of shards: local directories, URLs of any fsspec protocol, and commands (docs/data.md).

fsspec reads the URLs. Added here is what it lacks: retries, a check of the returned range over http, a total deadline
per read, and a comparison with the size in the index. Local files stay open (9 us for 60 kB; 33 us through fsspec).
"""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, Protocol, TypeVar

from lvlm_clorae.data.index import INDEX_NAME, DatasetEntry, Index, ShardEntry, decode_index, load_index
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import file_errors

MAX_OPEN_SHARDS = 16
MAX_INDEX_BYTES = 1 << 30
BLOCK = 1 << 24
"""Bytes per request when a whole shard is downloaded, so that a broken connection repeats at most this much."""
MIN_RATE = 1 << 20
"""Bytes per second. The deadline of a file that is downloaded in one piece grows by its size divided by this."""
LONGEST_PAUSE = 30.0
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_PERMANENT_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError, ImportError)

Result = TypeVar("Result")


class ShardStorage(Protocol):
    """Random access to the shards of one location. It may be sent to DataLoader workers, forked or spawned."""

    name: str
    """The location as the user wrote it, without credentials."""
    concurrent_reads: int
    """Number of reads that are worth running at the same time."""

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        """Read bytes ``start`` to ``stop`` of a shard; fewer if a local file is truncated. Raises UserError."""


def open_storages(
    shards: str, cache_dir: Path | str | None = None, cache_gib: float = 50.0
) -> tuple[Index, dict[str, ShardStorage]]:
    """Read the joined index of all locations in ``shards`` and open the storage of each dataset.

    Args:
        shards: location of the shards, see the head of this module; braces name several
        cache_dir: local directory that keeps whole shards of remote locations, at most ``cache_gib`` GiB

    Raises:
        UserError: a location cannot be read or has no valid index; two locations have the same dataset; a command is
            given without ``cache_dir``; the package of a protocol is not installed.
    """
    import braceexpand

    try:  # Braces in a command belong to the shell or stand for the file name.
        locations = [shards] if shards.startswith("pipe:") else list(braceexpand.braceexpand(shards))
    except ValueError as error:
        raise UserError(f'"{shards}": the braces cannot be expanded ({error}).') from None
    datasets: dict[str, DatasetEntry] = {}
    storages: dict[str, ShardStorage] = {}
    for location in locations:
        index, storage = _open(location, cache_dir, cache_gib)
        for name in index.datasets:
            if name in storages:
                raise UserError(f'{storage.name}: has the dataset "{name}", as does {storages[name].name}. Keep one.')
            storages[name] = storage
        datasets.update(index.datasets)
    return Index(dict(sorted(datasets.items()))), storages


def _open(location: str, cache_dir: Path | str | None, cache_gib: float) -> tuple[Index, ShardStorage]:
    location = location.removeprefix("file://")
    if not location.startswith("pipe:") and "://" not in location:
        directory = Path(location).expanduser()
        return load_index(directory), LocalStorage(directory)
    storage = CommandStorage(location) if location.startswith("pipe:") else FsspecStorage(location)
    if cache_dir:
        from lvlm_clorae.data.shard_cache import ShardCache

        return read_index(storage), ShardCache(storage, Path(cache_dir), int(cache_gib * 2**30))
    if isinstance(storage, CommandStorage):
        raise UserError(f"{location}: a command gives whole files only. Name a local directory with --cache_dir.")
    return read_index(storage), storage


def read_index(storage: FsspecStorage | CommandStorage) -> Index:
    """Read the index of a remote location. Raises UserError as :func:`decode_index`, or if it cannot be read."""
    with TemporaryDirectory() as folder:
        path = Path(folder, INDEX_NAME)
        storage.download(INDEX_NAME, path)
        return decode_index(path.read_bytes(), f"{storage.name}/{INDEX_NAME}")


def read_url(url: str, max_bytes: int, seconds: float) -> bytes:
    """Read a whole file at an http(s) URL within ``seconds``. Raises UserError if it has more than ``max_bytes``."""
    name = _without_credentials(url)

    def read() -> bytes:
        fs, _ = _filesystem("/".join(url.split("/")[:3]), os.getpid())
        data = bytearray()
        with fs.open(url, block_size=0) as handle:  # 0: streamed
            while chunk := handle.read(1 << 18):
                data += chunk
                if len(data) > max_bytes:
                    raise UserError(f"{name}: has more than the {max_bytes} bytes allowed.")
        return bytes(data)

    return _retry(name, FsspecStorage(url), seconds, lambda left: _run_within(left, read))


class LocalStorage:
    """A local directory. Reads do not move the file offset, which a forked worker shares with its parent."""

    concurrent_reads = 1

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, str(directory)
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        with file_errors(f"{self.directory / shard.name}: cannot be read"):
            return self.read_file(shard.name, start, stop)

    def read_file(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes of any file in the directory, also of one that was removed since it was opened. Raises OSError."""
        if name not in self._open:
            self._open[name] = open(self.directory / name, "rb")  # noqa: SIM115 - stays open
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return os.pread(self._open[name].fileno(), stop - start, start)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}


class FsspecStorage:
    """A directory at a URL of any fsspec protocol. Credentials in the URL are sent and do not appear in messages."""

    attempts, backoff, deadline = 6, 0.5, 300.0
    """See :func:`_retry`."""

    def __init__(self, url: str) -> None:
        self._url, self.name = url.rstrip("/"), _without_credentials(url.rstrip("/"))
        self._sizes_checked: set[str] = set()
        self._protocol, filesystem = url.partition("://")[0], _filesystem_class(url)
        # Threads cannot share the connection of most synchronous filesystems; that of hf is thread-safe.
        self.concurrent_reads = 16 if filesystem.async_impl or self._protocol == "hf" else 1
        # Synchronous filesystems read through a file object, whose cache would fetch whole blocks.
        self._options = {} if filesystem.async_impl else {"cache_type": "none"}

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        options: dict[str, Any] = self._options
        if self._protocol in ("http", "https"):
            expected = f"bytes {start}-{stop - 1}/{shard.bytes}"
            options = {"raise_for_status": partial(_check_range, f"{self.name}/{shard.name}", expected)}
        elif shard.name not in self._sizes_checked:
            size = self._call(shard.name, lambda fs, path: fs.size(path))
            if size != shard.bytes:
                raise UserError(
                    f"{self.name}/{shard.name}: has {size} bytes, the index says {shard.bytes}. "
                    "Upload shards and index again."
                )
            self._sizes_checked.add(shard.name)

        def read_once(fs: Any, path: str) -> bytes:
            data: bytes = fs.cat_file(path, start=start, end=stop, **options)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes received, {stop - start} expected")
            return data

        return self._call(shard.name, read_once)

    def download(self, file: str | ShardEntry, path: Path) -> None:
        """Write a shard, or a file of at most ``MAX_INDEX_BYTES``, to ``path``. Raises UserError as :meth:`read`."""
        if isinstance(file, str):
            return self._download_at_once(file, path, MAX_INDEX_BYTES, self.deadline)
        try:
            with open(path, "wb") as handle:
                for start in range(0, file.bytes, BLOCK):
                    handle.write(self.read(file, start, min(start + BLOCK, file.bytes)))
        except _RangesUnsupported:
            self._download_at_once(file.name, path, file.bytes, self.deadline + file.bytes / MIN_RATE)

    def _download_at_once(self, name: str, path: Path, max_bytes: int, seconds: float) -> None:
        from fsspec.callbacks import Callback

        def check_size(size: int | None, value: int, **_: Any) -> None:
            if value > max_bytes:
                raise UserError(f"{self.name}/{name}: has more than the {max_bytes} bytes allowed.")

        hooks = {"check_size": check_size}
        self._call(name, lambda fs, source: fs.get_file(source, str(path), callback=Callback(hooks=hooks)), seconds)

    def _call(self, name: str, function: Callable[[Any, str], Result], seconds: float | None = None) -> Result:
        def call() -> Result:
            fs, root = _filesystem(self._url, os.getpid())
            return function(fs, f"{root}/{name}")

        return _retry(f"{self.name}/{name}", self, seconds or self.deadline, lambda left: _run_within(left, call))


class CommandStorage:
    """``pipe:COMMAND``: a shell command, with ``{}`` in place of the file name, that writes the file to stdout."""

    attempts, backoff, deadline = 3, 0.5, 300.0

    def __init__(self, name: str) -> None:
        if "{}" not in name:
            raise UserError(f'{name}: has no {{}} for the file name. Write, for example, "pipe:cat /data/{{}}".')
        self.name = name

    def download(self, file: str | ShardEntry, path: Path) -> None:
        """Write a shard, or a file of at most ``MAX_INDEX_BYTES``, to ``path``. Raises UserError."""
        name, size = (file, 0) if isinstance(file, str) else (file.name, file.bytes)
        command, max_bytes = self.name.replace("{}", shlex.quote(name)), size or MAX_INDEX_BYTES

        def run(seconds: float) -> None:
            # timeout also kills the processes that the command has started.
            line = ["timeout", "--signal=KILL", f"{seconds:.3f}", "sh", "-c", command.removeprefix("pipe:")]
            with open(path, "wb") as handle, subprocess.Popen(line, stdout=subprocess.PIPE) as process:
                assert process.stdout
                while data := process.stdout.read(1 << 18):
                    handle.write(data)
                    if handle.tell() > max_bytes:
                        raise UserError(f"{command}: writes more than the {max_bytes} bytes allowed.")
            if process.returncode:
                raise OSError(f"exit code {process.returncode}")

        _retry(command, self, self.deadline + size / MIN_RATE, run)


class _RangesUnsupported(UserError):
    """The server sends whole files only."""


async def _check_range(url: str, expected: str, response: Any) -> None:
    """Reject, before its body is read, an http response other than the range that was asked for."""
    if response.status == 200:
        raise _RangesUnsupported(
            f"{url}: the server ignores byte ranges, so each sample would cost the whole file. "
            "Name a local directory that keeps whole shards with --cache_dir."
        )
    found = response.headers.get("Content-Range")
    if response.status == 206 and found != expected:
        raise UserError(f'{url}: the server sends "{found}", not "{expected}". Upload shards and index again.')


@cache
def _filesystem(url: str, process: int) -> tuple[Any, str]:
    """Return the filesystem and path of a URL. Each process has its own: event loop and connections end at a fork.

    They are never freed: a forked child that finalized its parent's sessions would remove sockets from a shared epoll.
    """
    from fsspec.core import url_to_fs

    if not url.startswith(("http://", "https://")):
        return url_to_fs(url)
    from aiohttp import ClientTimeout

    # "identity": ranges are of the stored bytes. trust_env: proxies come from the environment.
    client: dict[str, Any] = {"headers": {"Accept-Encoding": "identity"}, "trust_env": True}
    return url_to_fs(url, client_kwargs={**client, "timeout": ClientTimeout(None, sock_connect=30, sock_read=60)})


def _filesystem_class(url: str) -> Any:
    from fsspec.registry import get_filesystem_class, known_implementations

    protocol, name = url.partition("://")[0], _without_credentials(url)
    try:
        return get_filesystem_class(protocol)
    except ValueError:
        raise UserError(f"{name}: unknown protocol. Use one of fsspec's, a local directory or pipe:COMMAND.") from None
    except ImportError as error:
        package = known_implementations[protocol]["class"].split(".")[0]
        suggestion = str(error) if package == "fsspec" else f"Install it with: pip install {package}"
        raise UserError(f"{name}: a package for this protocol is missing. {suggestion}") from None


def _retry(
    name: str, policy: FsspecStorage | CommandStorage, seconds: float, attempt: Callable[[float], Result]
) -> Result:
    """Return ``attempt(seconds left)``; after transient failures again, up to ``policy.attempts`` and ``seconds``.

    Pauses begin at ``policy.backoff`` seconds and double, or are the server's ``Retry-After``, up to ``LONGEST_PAUSE``.
    """
    end = time.monotonic() + seconds
    for number in range(1, policy.attempts + 1):
        try:
            return attempt(end - time.monotonic())
        except UserError:
            raise
        except Exception as error:
            status = getattr(error, "status", None)
            reason = f"status {status}" if status else _without_credentials(f"{type(error).__name__}: {error}")
            if isinstance(error, _PERMANENT_ERRORS) or (status and status not in _TRANSIENT_STATUS):
                raise UserError(f"{name}: cannot be read ({reason}).") from None
            asked = (getattr(error, "headers", None) or {}).get("Retry-After", "")
            own = policy.backoff * 2 ** (number - 1) * random.uniform(1, 1.2)
            pause = min(float(asked) if asked.isdigit() else own, LONGEST_PAUSE)
        if number == policy.attempts or time.monotonic() + pause >= end:
            break
        time.sleep(pause)
    raise UserError(f"{name}: cannot be read, {number} attempts failed (the last: {reason}).")


def _run_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return ``function()``. Raises TimeoutError after ``seconds``."""
    future = run_in_daemon(function)
    if not wait([future], seconds).done:
        raise TimeoutError(f"no complete answer within {seconds:.0f} s")
    return future.result()


def run_in_daemon(function: Callable[[], Result]) -> Future[Result]:
    """Run ``function`` in a thread that does not delay the end of the process."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _without_credentials(text: str) -> str:
    return re.sub(r"(?<!abfs:)(?<!abfss:)//[^/\s]*@", "//", text)  # abfs://container@account names no user
