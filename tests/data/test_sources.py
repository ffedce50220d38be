"""A directory of shards: files are read as they are shared, and not all of them stay open."""

from __future__ import annotations

import os
from pathlib import Path

from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.sources import MAX_OPEN_SHARDS, LocalSource
from tests.data.helpers import write_toy


def test_open_files_are_bounded(tmp_path: Path) -> None:
    index = write_toy(tmp_path, counts=(("train", 40),), max_samples=1)
    source = LocalSource(tmp_path)
    reader = ShardReader(index, {"toy": source})
    for _ in range(2):
        keys = [reader.read("toy", "train", Place(number, 0)).key for number in range(40)]
        assert keys == [f"{number:06d}_toy" for number in range(40)]
    handles = list(source._open.values())
    assert len(handles) == MAX_OPEN_SHARDS
    source.close()
    assert all(handle.closed for handle in handles)


def test_reading_moves_no_offset_that_forked_workers_share(tmp_path: Path) -> None:
    """A forked process has its parent's open files with one offset for both: a seek of one would move the other's."""
    (shard,) = write_toy(tmp_path).dataset("toy").splits["train"]
    source = LocalSource(tmp_path)
    source.read(shard, 0, 10)
    (handle,) = source._open.values()
    before = os.lseek(handle.fileno(), 0, os.SEEK_CUR)
    source.read(shard, 512, 1024)
    assert os.lseek(handle.fileno(), 0, os.SEEK_CUR) == before
