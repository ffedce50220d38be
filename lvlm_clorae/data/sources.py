"""Where shards lie, and bytes from there: a directory, an http(s) URL, or a command that writes a file to its output.

``open_shards`` takes what a user writes: braces expand to several places, and their indexes become one.

    shards/real                                      a directory with its index.json
    /data/{twitter,mnre}/shards                      two of them
    https://host/shards                              ranges of bytes are read, where the server gives them
    pipe:aws s3 cp s3://bucket/shards/{} -           {} is the file's name; needs a cache, for a pipe has no offsets
    gs://bucket/shards                               likewise, by webdataset's openers (gs, hf, ais, sftp ...)
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, Protocol

import braceexpand

from lvlm_clorae.data.index import DatasetEntry, Index, ShardEntry, load_index, read_index
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


def open_shards(
    places: str, cache: Path | None = None, cache_bytes: int = 50 << 30, check_files: bool = True
) -> tuple[Index, dict[str, Source]]:
    """The joined index of all ``places``, and the source of each of its datasets.

    Args:
        places: see the head of this file
        cache: directory where whole shards of remote places are kept, up to ``cache_bytes``
        check_files: also that the shards of local directories are there in their full size

    Raises:
        UserError: a place that cannot be read, or has no sound index; a dataset that two places have; a pipe without
            a cache.
    """
    datasets: dict[str, DatasetEntry] = {}
    sources: dict[str, Source] = {}
    for place in _expanded(places):
        index, source = _open(place, cache, cache_bytes, check_files)
        for name in index.datasets:
            if name in sources:
                raise UserError(f'{source.name}: has the dataset "{name}", as {sources[name].name} has. Name one only.')
            sources[name] = source
        datasets.update(index.datasets)
    return Index({name: datasets[name] for name in sorted(datasets)}), sources


def _expanded(places: str) -> list[str]:
    """One place a string. A pipe's ``{}`` and what the shell does with braces are left as they are."""
    if places.startswith("pipe:"):
        return [places]
    try:
        return list(braceexpand.braceexpand(places))
    except ValueError as error:
        raise UserError(f'"{places}": its braces cannot be expanded ({error}).') from None


def _open(place: str, cache: Path | None, cache_bytes: int, check_files: bool) -> tuple[Index, Source]:
    scheme = place.partition(":")[0] if "://" in place or place.startswith("pipe:") else ""
    if scheme in ("", "file"):
        directory = Path(place.removeprefix("file://")).expanduser()
        return load_index(directory, check_files), LocalSource(directory)

    from lvlm_clorae.data.cache import CachedSource, ShardCache
    from lvlm_clorae.data.remote import CommandSource, HttpSource

    source: Source
    if scheme in ("http", "https"):
        source = HttpSource(place)
    else:
        source = CommandSource(place)
        if cache is None:
            raise UserError(
                f"{place}: gives whole files only, while samples are read here and there. "
                "Name a local directory to keep shards in with --cache-dir."
            )
    index = read_index(source)
    return index, CachedSource(source, ShardCache(cache, cache_bytes)) if cache else source
