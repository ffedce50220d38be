"""Where shards lie, as a user writes it: braces expand to several places, and their indexes become one.

shards/real                                      a directory with its index.json
/data/{twitter,mnre}/shards                      two of them
https://host/shards                              ranges of bytes are read, where the server gives them
pipe:aws s3 cp s3://bucket/shards/{} -           {} is the file's name; needs a cache, for a pipe has no offsets
gs://bucket/shards                               likewise, by webdataset's openers (gs, hf, ais, sftp ...)
"""

from __future__ import annotations

import io
from pathlib import Path

import braceexpand

from lvlm_clorae.data.index import INDEX_NAME, DatasetEntry, Index, decode_index, load_index
from lvlm_clorae.data.sources import LocalSource, Source
from lvlm_clorae.errors import UserError

MAX_INDEX_BYTES = 1 << 30


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


def read_index(source: Source) -> Index:
    """The index of a remote place. Raises UserError as :func:`load_index`, and as the source."""
    handle = io.BytesIO()
    source.copy(INDEX_NAME, handle, MAX_INDEX_BYTES)
    return decode_index(handle.getvalue(), f"{source.name}, {INDEX_NAME}")
