"""Cache of shards: verified bytes, a size limit, and one download for all processes."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from pathlib import Path

import pytest

from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import Index, ShardEntry
from lvlm_clorae.data.sampler import SampleRef
from lvlm_clorae.data.shard_cache import ShardCache
from lvlm_clorae.data.storage import CommandStorage, open_storages
from lvlm_clorae.errors import UserError
from tests.data.storage_workers import read_whole_shards
from tests.helpers.server import serve
from tests.helpers.shards import write_toy

COUNT = 12
KEYS = [f"{number:06d}_toy" for number in range(COUNT)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_toy(tmp_path / "shards", counts=(("train", COUNT),), max_samples=3)
    return tmp_path / "shards"


@pytest.fixture
def index(directory: Path) -> Index:
    return open_storages(str(directory))[0]


@pytest.fixture
def command(directory: Path) -> CommandStorage:
    return CommandStorage(f"pipe:cat {directory}/{{}}")


def read_keys(reader: ShardDataset) -> list[str]:
    places = [SampleRef("toy/entity", number // 3, number % 3) for number in range(COUNT)]
    return [reader[place].key for place in places]


def test_every_shard_is_downloaded_once(directory: Path, tmp_path: Path) -> None:
    with serve(directory) as server:
        for _ in range(2):
            reader = ShardDataset(*open_storages(server.url, tmp_path / "cache"))
            assert read_keys(reader) == read_keys(reader) == KEYS
        assert sorted(server.requests) == [*["/index.json"] * 2, *(f"/toy-train-{n:06d}.tar" for n in range(4))]


def test_a_command_is_read_through_the_cache(command: CommandStorage, tmp_path: Path) -> None:
    assert read_keys(ShardDataset(*open_storages(command.name, tmp_path / "cache"))) == KEYS


def test_the_least_recently_used_shards_are_evicted(command: CommandStorage, index: Index, tmp_path: Path) -> None:
    shards = index.dataset("toy").splits["train"]
    for attempt in range(20):  # uses follow one another faster than a file system's clock ticks
        cache = ShardCache(command, tmp_path / f"cache{attempt}", 2 * max(shard.bytes for shard in shards))
        for number in (0, 1, 0, 1, 0, 2):
            cache.read(shards[number], 0, 512)
        kept = {path.stem for path in cache.directory.glob("*.tar")}
        assert kept == {shards[0].sha256, shards[2].sha256}


def change(cache: Path, shard: ShardEntry, data: bytes, seconds: int = 1) -> Path:
    """Write bytes into a cached file in place, later than it was downloaded."""
    path = cache / f"{shard.sha256}.tar"
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + seconds * 10**9))  # the clock ticks in milliseconds
    return path


@pytest.mark.parametrize("size", [0, -512, 512])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_changed_file_is_downloaded_again(
    directory: Path, index: Index, tmp_path: Path, size: int, restarted: bool
) -> None:
    shard = index.dataset("toy").splits["train"][0]
    content = (directory / shard.name).read_bytes()
    data = bytearray((content + bytes(512))[: len(content) + size])
    data[600] ^= 1
    with serve(directory) as server:
        cache, other = (open_storages(server.url, tmp_path / "cache")[1]["toy"] for _ in range(2))
        assert cache.read(shard, 0, shard.bytes) == other.read(shard, 0, shard.bytes) == content
        change(tmp_path / "cache", shard, bytes(data))
        if restarted:
            cache = open_storages(server.url, tmp_path / "cache")[1]["toy"]
        with pytest.warns(UserWarning, match=rf"{shard.name} is downloaded again: its bytes have changed"):
            assert cache.read(shard, 0, shard.bytes) == content
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cache.read(shard, 0, shard.bytes) == other.read(shard, 0, shard.bytes) == content
        assert server.requests.count(f"/{shard.name}") == 2


def test_a_file_is_hashed_once_and_again_only_when_it_has_been_written(
    command: CommandStorage, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvlm_clorae.data import shard_cache

    hashed, original = [], shard_cache.sha256_of
    monkeypatch.setattr(shard_cache, "sha256_of", lambda handle: hashed.append(handle.name) or original(handle))
    shard = index.dataset("toy").splits["train"][0]
    for _ in range(3):
        for _ in range(3):
            content = ShardCache(command, tmp_path / "cache", 1 << 30).read(shard, 0, shard.bytes)
        change(tmp_path / "cache", shard, content)
    assert len(hashed) == 3


def test_a_changed_file_that_cannot_be_downloaded_again_is_an_error(
    directory: Path, command: CommandStorage, index: Index, tmp_path: Path
) -> None:
    shard = index.dataset("toy").splits["train"][0]
    cache = ShardCache(command, tmp_path / "cache", 1 << 30)
    changed = bytes(512) + cache.read(shard, 0, shard.bytes)[512:]
    change(tmp_path / "cache", shard, changed)
    (directory / shard.name).write_bytes(changed)
    for _ in range(2):
        with pytest.warns(UserWarning, match="again"), pytest.raises(UserError, match=shard.name):
            cache.read(shard, 0, 512)


def test_a_download_with_a_transmission_error_is_repeated_once(directory: Path, index: Index, tmp_path: Path) -> None:
    shard = index.dataset("toy").splits["train"][0]
    first = tmp_path / "first"  # the first download has an error
    name = f"pipe:if mkdir {first} 2>/dev/null; then tr a b < {directory}/{{}}; else cat {directory}/{{}}; fi"
    cache = ShardCache(CommandStorage(name), tmp_path / "cache", 1 << 30)
    assert cache.read(shard, 0, shard.bytes) == (directory / shard.name).read_bytes()
    assert first.exists()


def test_a_size_limit_that_is_too_small_still_reads_and_warns(
    command: CommandStorage, index: Index, tmp_path: Path
) -> None:
    cache = ShardCache(command, tmp_path / "cache", 1)
    reader = ShardDataset(index, {"toy": cache})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_keys(reader) == KEYS
        assert read_keys(reader) == KEYS, "an evicted file that is open can be read"
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    cache._open.clear()
    with pytest.warns(UserWarning, match=r"--cache_gib"):
        read_keys(reader)


def test_bytes_other_than_the_indexs_are_rejected(
    directory: Path, command: CommandStorage, index: Index, tmp_path: Path
) -> None:
    path = directory / index.dataset("toy").splits["train"][1].name
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    for content in (bytes(data), bytes(data[:-512])):
        path.write_bytes(content)
        cache = ShardCache(command, tmp_path / "cache", 1 << 30)
        with pytest.raises(UserError, match=rf"{path.name} has {len(content)} bytes"):
            ShardDataset(index, {"toy": cache})[SampleRef("toy/entity", 1, 0)]
        assert not list((tmp_path / "cache").glob("*.tar"))
        assert not list((tmp_path / "cache").glob(".*.partial"))


def test_a_download_after_a_failed_one_does_not_warn(
    directory: Path, command: CommandStorage, index: Index, tmp_path: Path
) -> None:
    shard = index.dataset("toy").splits["train"][0]
    content = (directory / shard.name).read_bytes()
    cache = ShardCache(command, tmp_path / "cache", 1 << 30)
    (directory / shard.name).write_bytes(content[:-512])
    with pytest.raises(UserError, match=shard.name):
        cache.read(shard, 0, 512)
    (directory / shard.name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read(shard, 0, 512) == content[:512]


def test_a_partial_file_of_a_killed_process_is_removed(command: CommandStorage, index: Index, tmp_path: Path) -> None:
    shard = index.dataset("toy").splits["train"][0]
    cache = ShardCache(command, tmp_path / "cache", 1 << 30)
    cache.directory.mkdir()
    (cache.directory / f".{shard.sha256}.tar.1.partial").write_bytes(bytes(512))
    cache.read(shard, 0, 512)
    assert not list(cache.directory.glob(".*.partial"))


def test_a_directory_that_cannot_be_written_is_named(command: CommandStorage, index: Index, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    cache = ShardCache(command, tmp_path / "cache", 1 << 30)
    with pytest.raises(UserError, match=rf"^{tmp_path}/cache: .*(exists|Not a directory)"):
        ShardDataset(index, {"toy": cache})[SampleRef("toy/entity", 0, 0)]


@pytest.mark.integration
@pytest.mark.parametrize(("max_bytes", "start_method"), [(1 << 30, "fork"), (1, "fork"), (1 << 30, "spawn")])
def test_processes_share_the_cache(
    directory: Path, index: Index, tmp_path: Path, max_bytes: int, start_method: str
) -> None:
    context = multiprocessing.get_context(start_method)
    content = [(directory / shard.name).read_bytes() for shard in index.dataset("toy").splits["train"]]
    with serve(directory) as server:
        found = context.Queue()
        arguments = (server.url, index, tmp_path / "cache", max_bytes, found)
        processes = [context.Process(target=read_whole_shards, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        results = [found.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert results == [[content] * 3] * 3
        if max_bytes > 1:
            assert len(server.requests) == 4, "one download per shard for all processes"
    assert not list((tmp_path / "cache").glob(".*.partial"))
