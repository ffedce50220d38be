"""The cache of shards: right bytes or none, within its bound, one fetch for all who want the same shard."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path

import pytest

from lvlm_clorae.data.cache import CachedSource, ShardCache
from lvlm_clorae.data.index import Index
from lvlm_clorae.data.places import open_shards
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.remote import CommandSource, HttpSource
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.errors import UserError
from tests.data.helpers import write_toy
from tests.data.server import serve

COUNT = 12


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_toy(tmp_path / "shards", counts=(("train", COUNT),), max_samples=3)
    return tmp_path / "shards"


@pytest.fixture
def index(directory: Path) -> Index:
    return open_shards(str(directory))[0]


def keys(reader: ShardReader) -> list[str]:
    places = [Place(number // 3, number % 3) for number in range(COUNT)]
    return [reader.read("toy", "train", place).key for place in places]


def size_of(index: Index) -> int:
    return max(shard.bytes for shard in index.dataset("toy").splits["train"])


def test_every_shard_is_fetched_once(directory: Path, tmp_path: Path) -> None:
    with serve(directory) as server:
        for _ in range(2):
            reader = ShardReader(*open_shards(server.url, tmp_path / "cache"))
            assert keys(reader) == keys(reader) == [f"{number:06d}_toy" for number in range(COUNT)]
        assert sorted(server.requests) == [*["/index.json"] * 2, *(f"/toy-train-{n:06d}.tar" for n in range(4))]


def test_a_pipe_needs_no_offsets(directory: Path, tmp_path: Path) -> None:
    reader = ShardReader(*open_shards(f"pipe:cat {directory}/{{}}", tmp_path / "cache"))
    assert len(set(keys(reader))) == COUNT


def test_the_least_recently_used_shards_make_room(directory: Path, index: Index, tmp_path: Path) -> None:
    source = CommandSource(f"pipe:cat {directory}/{{}}")
    shards = index.dataset("toy").splits["train"]
    for attempt in range(20):  # uses follow one another faster than a file system's clock ticks
        cache = ShardCache(tmp_path / f"cache{attempt}", 2 * size_of(index))
        for number in (1, 0, 1, 0, 1, 0, 2):
            cache.fetch(source, shards[number])
        kept = {path.stem for path in cache.directory.glob("*.tar")}
        assert kept == {shards[0].sha256, shards[2].sha256}


def test_a_bound_that_is_too_small_still_reads_and_warns(directory: Path, index: Index, tmp_path: Path) -> None:
    cached = CachedSource(CommandSource(f"pipe:cat {directory}/{{}}"), ShardCache(tmp_path / "cache", 1))
    reader = ShardReader(index, {"toy": cached})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(set(keys(reader))) == COUNT
        assert len(set(keys(reader))) == COUNT, "a file that is removed while it is open goes on"
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    other = CachedSource(CommandSource(f"pipe:cat {directory}/{{}}"), cached._cache)
    with pytest.warns(UserWarning, match=r"fetched again.*--cache-gib"):
        keys(ShardReader(index, {"toy": other}))


def test_other_bytes_than_the_indexs_are_an_error_and_are_not_kept(
    directory: Path, index: Index, tmp_path: Path
) -> None:
    path = directory / index.dataset("toy").splits["train"][1].name
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    for content in (bytes(data), bytes(data[:-512])):
        path.write_bytes(content)
        source = CachedSource(CommandSource(f"pipe:cat {directory}/{{}}"), ShardCache(tmp_path / "cache", 1 << 30))
        with pytest.raises(UserError, match=rf"{path.name} has {len(content)} bytes where the index says"):
            ShardReader(index, {"toy": source}).read("toy", "train", Place(1, 0))
        assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_place_that_cannot_be_written_is_named(directory: Path, index: Index, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    source = CachedSource(CommandSource(f"pipe:cat {directory}/{{}}"), ShardCache(tmp_path / "cache", 1 << 30))
    with pytest.raises(UserError, match=r"cache: .* cannot be kept there \(.*(exists|Not a directory)"):
        ShardReader(index, {"toy": source}).read("toy", "train", Place(0, 0))


def _read_all(url: str, index: Index, cache: Path, bound: int, rounds: int, found: multiprocessing.Queue) -> None:
    warnings.simplefilter("ignore")
    reader = ShardReader(index, {"toy": CachedSource(HttpSource(url, backoff=0.01), ShardCache(cache, bound))})
    found.put([keys(reader) for _ in range(rounds)])


@pytest.mark.parametrize("room", [1 << 30, 1])
def test_processes_share_it_whatever_its_bound(directory: Path, index: Index, tmp_path: Path, room: int) -> None:
    context = multiprocessing.get_context("spawn")
    with serve(directory) as server:
        found = context.Queue()
        how = (server.url, index, tmp_path / "cache", room, 3, found)
        processes = [context.Process(target=_read_all, args=how) for _ in range(3)]
        for process in processes:
            process.start()
        results = [found.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        expected = [f"{number:06d}_toy" for number in range(COUNT)]
        assert results == [[expected] * 3] * 3
        if room > 1:
            assert len(server.requests) == 4, "one fetch a shard for all"
    assert not list((tmp_path / "cache").glob("*.partial"))
