"""What worker processes of the storage tests run; apart, since a spawned worker imports this module alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lvlm_clorae.data.index import Index, ShardEntry
from lvlm_clorae.data.shard_cache import ShardCache
from lvlm_clorae.data.storage import FsspecStorage, ShardStorage


def read_two_blocks(storage: ShardStorage, shard: ShardEntry, found: Any) -> None:
    """Put the first and second 512 bytes of the shard on the queue."""
    found.put([storage.read(shard, start, start + 512) for start in (0, 512)])


def read_whole_shards(url: str, index: Index, cache: Path, max_bytes: int, found: Any) -> None:
    """Put the content of all training shards on the queue, read three times by single samples through a cache."""
    warnings.simplefilter("ignore")
    storage = ShardCache(FsspecStorage(url), cache, max_bytes)
    found.put([[_content(storage, shard) for shard in index.dataset("toy").splits["train"]] for _ in range(3)])


def _content(storage: ShardStorage, shard: ShardEntry) -> bytes:
    stops = [*shard.offsets[1:], shard.bytes]
    return b"".join(storage.read(shard, *part) for part in zip(shard.offsets, stops, strict=True))
