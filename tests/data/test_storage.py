"""Storage of shards: the same bytes from every protocol, retries and deadlines, and errors that name the file."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lvlm_clorae.data import storage as storage_module
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import INDEX_NAME, Index, ShardEntry
from lvlm_clorae.data.reader import InvalidSample
from lvlm_clorae.data.sampler import SampleRef
from lvlm_clorae.data.storage import (
    MAX_OPEN_SHARDS,
    CommandStorage,
    FsspecStorage,
    LocalStorage,
    open_storages,
    read_index,
)
from lvlm_clorae.errors import UserError
from tests.data.storage_workers import read_two_blocks
from tests.helpers.server import Server, serve
from tests.helpers.shards import SPEC, write_toy


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_toy(tmp_path)


@pytest.fixture
def shard(index: Index) -> ShardEntry:
    (shard,) = index.dataset("toy").splits["train"]
    return shard


@pytest.fixture
def server(tmp_path: Path, index: Index) -> Iterator[Server]:
    with serve(tmp_path) as server:
        yield server


def storage_of(url: str, **policy: Any) -> FsspecStorage:
    """A storage without long pauses; ``policy`` sets attempts, backoff or deadline."""
    storage = FsspecStorage(url)
    for name, value in {"backoff": 0.001, **policy}.items():
        setattr(storage, name, value)
    return storage


# ---- local directories


def test_open_files_are_bounded(tmp_path: Path) -> None:
    index = write_toy(tmp_path, counts=(("train", 40),), max_samples=1)
    storage = LocalStorage(tmp_path)
    reader = ShardDataset(index, {"toy": storage})
    for _ in range(2):
        keys = [reader[SampleRef("toy/entity", number, 0)].key for number in range(40)]
        assert keys == [f"{number:06d}_toy" for number in range(40)]
    assert len(storage._open) == MAX_OPEN_SHARDS


def test_local_reads_do_not_move_the_file_offset(tmp_path: Path, shard: ShardEntry) -> None:
    """A forked process shares the offset of its parent's open files: a seek in one would move the other's."""
    storage = LocalStorage(tmp_path)
    storage.read(shard, 0, 10)
    (handle,) = storage._open.values()
    before = os.lseek(handle.fileno(), 0, os.SEEK_CUR)
    storage.read(shard, 16384, 17408)
    assert os.lseek(handle.fileno(), 0, os.SEEK_CUR) == before


# ---- http


def test_samples_over_http_equal_those_of_the_directory(server: Server, index: Index, shard: ShardEntry) -> None:
    storage = storage_of(server.url + "/")
    assert read_index(storage) == index
    sent = server.bytes_sent
    places = [SampleRef("toy/entity", 0, number) for number in (5, 0, 3, 6)]
    local, remote = ShardDataset(index, server.directory), ShardDataset(index, {"toy": storage})
    assert remote.__getitems__(places) == local.__getitems__(places)
    stops = [*shard.offsets[1:], shard.bytes]
    needed = sum(stops[place.sample] - shard.offsets[place.sample] for place in places)
    assert server.bytes_sent - sent == needed
    assert {headers["accept-encoding"] for headers in server.headers_seen} == {"identity"}


@pytest.mark.parametrize("fault", [503, 500, 429, "drop"])
def test_transient_failures_are_retried(server: Server, index: Index, fault: int | str) -> None:
    server.fault = lambda number: fault if number % 3 else None
    remote, local = ShardDataset(index, {"toy": storage_of(server.url)}), ShardDataset(index, server.directory)
    for number in range(7):
        assert remote[SampleRef("toy/entity", 0, number)] == local[SampleRef("toy/entity", 0, number)]


@pytest.mark.parametrize("fault", [503, "drop"])
def test_lasting_failures_name_the_url_and_the_attempts(server: Server, index: Index, fault: int | str) -> None:
    server.fault = lambda number: fault
    reader = ShardDataset(index, {"toy": storage_of(server.url, attempts=4)})
    with pytest.raises(UserError, match=rf"^{server.url}/toy-train-000000.tar: .* 4 attempts") as caught:
        reader[SampleRef("toy/entity", 0, 0)]
    assert not isinstance(caught.value, InvalidSample)
    assert len(server.requests) == 4


@pytest.mark.integration
@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_a_read_without_an_answer_fails_at_the_deadline(server: Server, shard: ShardEntry, fault: str) -> None:
    server.fault = lambda number: fault
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^{server.url}/toy-train-000000.tar: "):
        storage_of(server.url, deadline=0.5).read(shard, 0, shard.bytes)
    with pytest.raises(UserError, match=rf"^{server.url}/{INDEX_NAME}: "):
        read_index(storage_of(server.url, deadline=0.5))
    assert 0.9 < time.monotonic() - start < 3


@pytest.mark.integration
def test_a_hanging_read_does_not_delay_the_exit(server: Server) -> None:
    server.fault = lambda number: "hang"
    code = (
        "from lvlm_clorae.data.storage import FsspecStorage, read_index; import sys\n"
        "storage = FsspecStorage(sys.argv[1]); storage.deadline = 0.2; read_index(storage)"
    )
    done = subprocess.run([sys.executable, "-c", code, server.url], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert server.url in done.stderr.splitlines()[-1]


def test_attempts_and_pauses_share_one_deadline(server: Server, shard: ShardEntry) -> None:
    server.fault = lambda number: 503
    server.retry_after = "20"
    start = time.monotonic()
    with pytest.raises(UserError, match="503"):
        storage_of(server.url, deadline=10.0).read(shard, 0, 512)
    assert time.monotonic() - start < 5
    assert len(server.requests) == 1


def test_a_download_continues_after_a_broken_connection(
    server: Server, shard: ShardEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "BLOCK", 2048)
    server.fault = lambda number: "drop" if number in (2, 4, 5) else None
    target, content = tmp_path / "copy", (server.directory / shard.name).read_bytes()
    storage_of(server.url).download(shard, target)
    assert target.read_bytes() == content
    assert server.bytes_sent == shard.bytes + 3 * 1024, "only the broken blocks are sent twice"


def test_a_server_without_ranges_serves_whole_shards(server: Server, shard: ShardEntry, tmp_path: Path) -> None:
    server.ranges = False
    server.fault = lambda number: "drop" if number in (2, 3) else None
    target = tmp_path / "copy"
    storage_of(server.url).download(shard, target)
    assert target.read_bytes() == (server.directory / shard.name).read_bytes()


def test_pauses_grow_and_follow_retry_after(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage_module.time, "sleep", pauses.append)
    server.fault = lambda number: 503
    for asked in (None, "7", "86400"):
        server.retry_after = asked
        with pytest.raises(UserError):
            read_index(storage_of(server.url, attempts=4, backoff=1.0))
    own, theirs, bounded = pauses[:3], pauses[3:6], pauses[6:]
    assert all(low <= pause < 1.3 * low for pause, low in zip(own, (1, 2, 4), strict=True))
    assert theirs == [7.0] * 3
    assert bounded == [30.0] * 3


def test_a_server_that_is_gone_is_an_error(index: Index, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        storage = storage_of(server.url, attempts=2)
    with pytest.raises(UserError, match="2 attempts"):
        ShardDataset(index, {"toy": storage})[SampleRef("toy/entity", 0, 0)]


def test_permanent_failures_are_not_retried(server: Server, index: Index, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{server.url}/other\.json: .*FileNotFound"):
        storage_of(server.url).download("other.json", tmp_path / "copy")
    server.fault = lambda number: 403 if number == 2 else None
    with pytest.raises(UserError, match="status 403"):
        read_index(storage_of(server.url))
    server.ranges = False
    reader = ShardDataset(index, {"toy": storage_of(server.url)})
    sent = server.bytes_sent
    with pytest.raises(UserError, match=r"toy-train-000000\.tar: .*range.*--cache_dir"):
        reader[SampleRef("toy/entity", 0, 0)]
    assert len(server.requests) == 3
    server.ranges = True
    local = ShardDataset(index, server.directory)[SampleRef("toy/entity", 0, 0)]
    assert reader[SampleRef("toy/entity", 0, 0)] == local, "the rest of that answer is not read as the next one"
    assert sent < server.bytes_sent


def test_an_index_over_the_size_limit_is_rejected(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "MAX_INDEX_BYTES", 10)
    for storage in (storage_of(server.url), CommandStorage("pipe:yes {}")):
        with pytest.raises(UserError, match="more than the 10 bytes"):
            read_index(storage)


def test_a_shard_of_another_size_than_in_the_index_is_an_error(server: Server, index: Index, shard: ShardEntry) -> None:
    path = server.directory / shard.name
    for content in (path.read_bytes() + bytes(512), path.read_bytes()[:600]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{shard.name}: .*{len(content)}"):
            ShardDataset(index, {"toy": storage_of(server.url)})[SampleRef("toy/entity", 0, 0)]


def test_a_password_is_sent_and_not_shown(server: Server, index: Index, tmp_path: Path) -> None:
    storage = storage_of(server.url.replace("http://", "http://anna:sec%40ret@"), attempts=1)
    assert read_index(storage) == index
    assert server.headers_seen[-1]["authorization"] == "Basic YW5uYTpzZWNAcmV0"
    messages = [storage.name]
    for fault in (403, 503, 404, "drop"):
        server.fault = lambda number, fault=fault: fault  # type: ignore[misc]
        with pytest.raises(UserError) as caught:
            read_index(storage)
        messages.append(str(caught.value))
    assert not [message for message in messages if "sec" in message or "anna" in message]
    with serve(tmp_path) as other:
        server.redirect = other.url
        read_index(storage)
        assert "authorization" not in other.headers_seen[0], "another host does not get it"


def test_proxies_come_from_the_environment(server: Server, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    assert read_index(storage_of("http://shards.invalid")) == index
    assert server.requests == ["http://shards.invalid/index.json"]


@pytest.mark.integration
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_and_their_parent_read_at_the_same_time(server: Server, shard: ShardEntry, start_method: str) -> None:
    storage = storage_of(server.url, attempts=1, deadline=20.0)
    content = (server.directory / shard.name).read_bytes()
    assert storage.read(shard, 0, 512) == content[:512]  # the parent's connection stays open
    context = multiprocessing.get_context(start_method)
    found = context.Queue()
    workers = [context.Process(target=read_two_blocks, args=(storage, shard, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [found.get(timeout=60) for _ in workers]
    assert storage.read(shard, 512, 1024) == content[512:1024]
    for worker in workers:
        worker.join()
    assert results == [[content[:512], content[512:1024]]] * 2
    assert storage.read(shard, 0, 1024) == content[:1024]


# ---- other protocols


@pytest.fixture
def bucket(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of the toy shards in an S3 bucket on a local server."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.mkdir("bucket")
    fs.put(str(tmp_path), "bucket/shards", recursive=True)
    yield "s3://bucket/shards"
    server.stop()


@pytest.mark.integration
def test_s3_shards_are_read_in_the_process_and_its_workers(
    bucket: str, index: Index, shard: ShardEntry, tmp_path: Path
) -> None:
    found_index, storages = open_storages(bucket)
    assert found_index == index
    places = [SampleRef("toy/entity", 0, number) for number in (5, 0, 3)]
    local = ShardDataset(index, tmp_path).__getitems__(places)
    assert ShardDataset(index, storages).__getitems__(places) == local
    content = (tmp_path / shard.name).read_bytes()
    for context in (multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")):
        found = context.Queue()
        worker = context.Process(target=read_two_blocks, args=(storages["toy"], shard, found))
        worker.start()
        assert found.get(timeout=60) == [content[:512], content[512:1024]]
        worker.join()
        assert ShardDataset(index, storages).__getitems__(places) == local
    with pytest.raises(UserError, match=rf"{bucket}/{shard.name}: .*{shard.bytes}.*{shard.bytes + 512}"):
        storage_of(bucket).read(replace(shard, bytes=shard.bytes + 512), 0, 512)
    with pytest.raises(UserError, match=rf"^{bucket}/other.tar: "):
        storage_of(bucket).read(replace(shard, name="other.tar"), 0, 512)
    storage_of(bucket).download(shard, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    with pytest.raises(UserError, match=r"^s3://absent/shards/index\.json: "):
        open_storages("s3://absent/shards")


@pytest.fixture
def memory(index: Index, tmp_path: Path) -> Iterator[str]:
    """URL of the toy shards in fsspec's memory filesystem, which is synchronous."""
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path), "/shards", recursive=True)
    yield "memory://shards"
    fs.rm("/shards", recursive=True)


def test_a_synchronous_filesystem_is_read(memory: str, index: Index, shard: ShardEntry, tmp_path: Path) -> None:
    found_index, storages = open_storages(memory)
    assert found_index == index
    places = [SampleRef("toy/entity", 0, number) for number in (5, 0, 3)]
    local = ShardDataset(index, tmp_path).__getitems__(places)
    assert ShardDataset(index, storages).__getitems__(places) == local
    with pytest.raises(UserError, match=rf"{shard.name}: .*{shard.bytes}"):
        storage_of(memory).read(replace(shard, bytes=shard.bytes + 512), 0, 512)


def test_a_short_or_hanging_read_of_a_synchronous_filesystem_is_an_error(
    memory: str, shard: ShardEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = fsspec.get_filesystem_class("memory")
    answers = [b"short", bytes(512)]
    monkeypatch.setattr(filesystem, "cat_file", lambda *args, **options: answers.pop(0))
    assert storage_of(memory).read(shard, 0, 512) == bytes(512)
    monkeypatch.setattr(filesystem, "cat_file", lambda *args, **options: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^{memory}/{shard.name}: "):
        storage_of(memory, deadline=0.3).read(shard, 0, 512)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/a", "gcsfs"), ("az://bucket/a", "adlfs")])
def test_a_missing_package_is_named_with_its_command(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, url[:2], raising=False)
    with pytest.raises(UserError, match=f"pip install {package}") as caught:
        open_storages(url)
    assert "\n" not in str(caught.value)


def test_hf_urls_use_the_hubs_filesystem() -> None:
    from huggingface_hub import HfFileSystem

    storage = FsspecStorage("hf://datasets/someone/shards")
    filesystem, path = storage_module._filesystem(storage._url, os.getpid())
    assert isinstance(filesystem, HfFileSystem)
    assert path == "datasets/someone/shards"
    assert storage.concurrent_reads > 1


# ---- commands


def test_a_command_writes_the_file(index: Index, tmp_path: Path) -> None:
    assert read_index(CommandStorage(f"pipe:cat {tmp_path}/{{}}")) == index


@pytest.mark.integration
@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_command_over_a_bad_network_is_run_again(
    server: Server, index: Index, fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CommandStorage, "backoff", 0.001)
    fetch = "import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())"
    pipe = f"pipe:{shlex.quote(sys.executable)} -c {shlex.quote(fetch)} {server.url}/{{}} 2>/dev/null"
    server.fault = lambda number: fault if number < 3 else None
    assert read_index(CommandStorage(pipe)) == index
    server.fault = lambda number: fault
    with pytest.raises(UserError, match=rf"{server.url}/index\.json.*3 attempts"):
        read_index(CommandStorage(pipe))


@pytest.mark.integration
def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    storage = CommandStorage(f"pipe:(sleep 1; touch {tmp_path}/alive) & echo part; wait; cat {{}}")
    storage.deadline = 0.3
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^pipe:.*index\.json: "):
        read_index(storage)
    time.sleep(max(0, start + 1.5 - time.monotonic()))
    assert not (tmp_path / "alive").exists()


# ---- locations


def test_braces_join_the_indexes_of_several_locations(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_toy(tmp_path / name, replace(SPEC, name=name))
    index, storages = open_storages(f"{tmp_path}/{{second,first}}")
    assert list(index.datasets) == ["first", "second"]
    assert {name: storage.name for name, storage in storages.items()} == {
        "first": str(tmp_path / "first"),
        "second": str(tmp_path / "second"),
    }
    reader = ShardDataset(index, storages)
    assert reader[SampleRef("second/entity", 0, 1)].data["dataset"] == "second"
    with serve(tmp_path) as server:
        index, storages = open_storages(f"{server.url}/{{first,second}}/")
        assert ShardDataset(index, storages, "test")[SampleRef("first/entity", 0, 0)].data["dataset"] == "first"


def test_a_dataset_in_two_locations_is_an_error_that_names_both(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_toy(tmp_path / name)
    with pytest.raises(UserError, match=rf'{tmp_path}/b: .*"toy".*{tmp_path}/a'):
        open_storages(f"{tmp_path}/{{a,b}}")


def test_file_urls_and_home_directories_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy(tmp_path / "shards")
    monkeypatch.setenv("HOME", str(tmp_path))
    for location in (f"file://{tmp_path}/shards", "~/shards"):
        index, storages = open_storages(location)
        assert list(index.datasets) == ["toy"]
        assert isinstance(storages["toy"], LocalStorage)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/nowhere/{a,b}", "^/nowhere/a: "),
        ("s3x://bucket/shards", "^s3x://bucket/shards: "),
        ("pipe:cat /data/shards", r"^pipe:cat /data/shards: .*\{\}"),
        ("pipe:cat /data/{}", r"^pipe:cat /data/\{\}: .*--cache_dir"),
    ],
)
def test_locations_that_cannot_be_read_are_named(location: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_storages(location)


@pytest.mark.integration
def test_remote_libraries_are_imported_on_demand() -> None:
    code = (
        "import sys, lvlm_clorae.data.storage; print([m for m in ('fsspec', 'aiohttp', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
