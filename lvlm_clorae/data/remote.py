"""Shards that are elsewhere: over http(s) by ranges of bytes, or from any command that writes a file to its output."""

from __future__ import annotations

import os
import random
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Retry, Timeout
from webdataset.gopen import gopen, gopen_schemes

from lvlm_clorae.data.index import ShardEntry
from lvlm_clorae.errors import UserError

CHUNK = 1 << 18
ATTEMPTS = 6
LONGEST_PAUSE = 30.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same question is asked again."""

Result = TypeVar("Result")


class HttpSource:
    """A directory on a web server; a name and password in the address are sent to it and stay out of messages.

    What fails in passing (a dropped connection, a timeout, 503 ...) is tried again, ``attempts`` times in all, with
    growing pauses or the pause for which the server asks, up to 30 seconds; a file goes on from where it broke off.
    Proxies come from the environment, as for other programs.
    """

    concurrent = 16

    def __init__(self, url: str, attempts: int = ATTEMPTS, backoff: float = 0.5, timeout: float = 60.0) -> None:
        parts = urlsplit(url.rstrip("/"))
        self.name = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._attempts, self._backoff, self._timeout = attempts, backoff, timeout
        self._headers = {"Accept-Encoding": "identity"}
        if parts.username is not None:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers |= urllib3.make_headers(basic_auth=secret)
        self._pool: tuple[int, urllib3.PoolManager] | None = None

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        """See :class:`~lvlm_clorae.data.sources.Source`."""
        url = self._url(shard.name)

        def once() -> bytes:
            with self._get(url, f"bytes={start}-{stop - 1}") as response:
                if response.status != 206:
                    raise UserError(
                        f"{url}: the server gives no ranges of bytes, so every sample would cost the whole file. "
                        "Name a local directory to keep shards in with --cache-dir."
                    )
                got, expected = response.headers.get("Content-Range"), f"bytes {start}-{stop - 1}/{shard.bytes}"
                if got != expected:
                    raise UserError(
                        f'{url}: the server gives "{got}", not "{expected}". Upload shards and index again.'
                    )
                return response.read()

        return self._again(url, once)

    def copy(self, name: str, handle: IO[bytes], max_bytes: int) -> None:
        """See :class:`~lvlm_clorae.data.sources.Source`."""
        url = self._url(name)

        def rest() -> None:
            position = handle.tell()
            with self._get(url, f"bytes={position}-" if position else None) as response:
                if position and response.status != 206:  # from the beginning again
                    handle.seek(0)
                    handle.truncate()
                for chunk in response.stream(CHUNK):
                    handle.write(chunk)
                    if handle.tell() > max_bytes:
                        raise UserError(f"{url}: has more than the {max_bytes} bytes allowed. Is it the right file?")

        self._again(url, rest)

    def _url(self, name: str) -> str:
        return f"{self.name}/{quote(name)}"

    def _again(self, url: str, once: Callable[[], Result]) -> Result:
        """``once()``, again after what fails in passing. Raises UserError with the URL where it goes on failing."""
        for attempt in range(self._attempts):
            asked: float | None = None
            try:
                return once()
            except _Passing as error:
                reason, asked = str(error), error.pause
            except HTTPError as error:
                reason = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
            if attempt + 1 < self._attempts:
                pause = self._backoff * 2**attempt * random.uniform(1, 1.2) if asked is None else asked
                time.sleep(min(pause, LONGEST_PAUSE))
        raise UserError(f"{url}: cannot be read, {self._attempts} attempts failed (the last: {reason}).")

    @contextmanager
    def _get(self, url: str, ranged: str | None) -> Iterator[urllib3.BaseHTTPResponse]:
        headers = {**self._headers, **({"Range": ranged} if ranged else {})}
        response = self._connections().request("GET", url, headers=headers, preload_content=False, retries=_REDIRECTS)
        try:
            if response.status in _PASSING:
                asked = response.headers.get("Retry-After", "")
                raise _Passing(f"status {response.status}", float(asked) if asked.isdigit() else None)
            if response.status not in (200, 206):
                raise UserError(f"{url}: the server answers with status {response.status}. Is the address right?")
            yield response
        except BaseException:
            response.close()  # what is left of the answer would be read as the next one's beginning
            raise
        finally:
            response.release_conn()

    def _connections(self) -> urllib3.PoolManager:
        """Connections of this process: a forked worker must not speak into its parent's."""
        if self._pool is None or self._pool[0] != os.getpid():
            parts = urlsplit(self.name)
            proxy = getproxies().get(parts.scheme)
            how: dict[str, Any] = {"maxsize": self.concurrent, "timeout": Timeout(self._timeout)}
            if proxy and not proxy_bypass(parts.hostname or ""):
                self._pool = os.getpid(), urllib3.ProxyManager(proxy, **how)
            else:
                self._pool = os.getpid(), urllib3.PoolManager(**how)
        return self._pool[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}


_REDIRECTS = Retry(5, connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False)


class _Passing(Exception):
    """An answer that may be another in a moment; ``pause`` is what the server asks for, in seconds."""

    def __init__(self, reason: str, pause: float | None) -> None:
        super().__init__(reason)
        self.pause = pause


class CommandSource:
    """``pipe:COMMAND`` with ``{}`` for the file's name, or an address that webdataset opens by a command of its own.

    A command that fails is run again, ``attempts`` times in all.
    """

    concurrent = 1

    def __init__(self, place: str, attempts: int = 3) -> None:
        if place.startswith("pipe:") and "{}" not in place:
            raise UserError(f'{place}: needs {{}} where the name of the file is to stand, as in "pipe:cat /data/{{}}".')
        if not place.startswith("pipe:") and place.partition(":")[0] not in gopen_schemes:
            raise UserError(f"{place}: neither a directory nor an address that can be read. See shards/README.md.")
        self.name, self._attempts = place, attempts

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        """A command gives whole files only."""
        raise NotImplementedError

    def copy(self, name: str, handle: IO[bytes], max_bytes: int) -> None:
        """See :class:`~lvlm_clorae.data.sources.Source`."""
        pipe = self.name.startswith("pipe:")
        address = self.name.replace("{}", shlex.quote(name)) if pipe else f"{self.name.rstrip('/')}/{name}"
        for _ in range(self._attempts):
            handle.seek(0)
            handle.truncate()
            try:
                with gopen(address) as stream:
                    while chunk := stream.read(CHUNK):
                        handle.write(chunk)
                        if handle.tell() > max_bytes:
                            raise UserError(f"{address}: gives more than the {max_bytes} bytes allowed.")
                return
            except OSError as error:
                reason = error
        raise UserError(f"{address}: cannot be read, {self._attempts} attempts failed (the last: {reason}).")
