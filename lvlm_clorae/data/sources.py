"""Bytes of shards: what every place gives, and the simplest place, a directory."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, Protocol

from lvlm_clorae.data.index import ShardEntry
from lvlm_clorae.errors import UserError

MAX_OPEN_SHARDS = 16


class Source(Protocol):
    """Bytes of the files of one directory of shards. It goes to DataLoader workers, forked or spawned.

    Both methods raise UserError, naming the file, where its bytes cannot be had; that is never a bad sample.
    """

    name: str
    """As the user wrote it."""
    concurrent: int
    """How many reads at once are worth while: 1 where there is nothing to wait for."""

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a shard; fewer where a local file is cut off."""

    def copy(self, name: str, handle: IO[bytes], max_bytes: int) -> None:
        """The whole file to ``handle``, which is empty and can seek."""


class LocalSource:
    """A directory. Reads move no offset, which a forked worker would share with its parent."""

    concurrent = 1

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, str(directory)
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()

    def read(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        """See :class:`Source`."""
        try:
            return self.read_file(shard.name, start, stop)
        except OSError as error:
            raise UserError(f"{self.directory / shard.name}: cannot be read ({error.strerror}).") from None

    def read_file(self, name: str, start: int, stop: int) -> bytes:
        """Bytes of any file in the directory. Raises OSError."""
        if name not in self._open:
            self._open[name] = open(self.directory / name, "rb")  # noqa: SIM115 - kept open, see close
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return os.pread(self._open[name].fileno(), stop - start, start)

    def has_open(self, name: str) -> bool:
        """Whether the file is open, so that it can be read even where it was removed."""
        return name in self._open

    def copy(self, name: str, handle: IO[bytes], max_bytes: int) -> None:
        """A directory is read where it is."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}

    def close(self) -> None:
        """Close the open files."""
        while self._open:
            self._open.popitem()[1].close()
