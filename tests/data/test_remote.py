"""Remote shards: the bytes of local ones, whatever a server or a command does in passing, and clear errors else."""

from __future__ import annotations

import io
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data import remote
from lvlm_clorae.data.index import INDEX_NAME, Index
from lvlm_clorae.data.places import read_index
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.reader import BadSample
from lvlm_clorae.data.remote import CommandSource, HttpSource
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.errors import UserError
from tests.data.helpers import write_toy
from tests.data.server import Server, serve


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_toy(tmp_path)


@pytest.fixture
def server(tmp_path: Path, index: Index) -> Any:
    with serve(tmp_path) as server:
        yield server


def fast(server: Server, **how: Any) -> HttpSource:
    return HttpSource(server.url + "/", backoff=0.001, **how)


def test_samples_over_http_are_those_of_the_directory(server: Server, index: Index) -> None:
    source = fast(server)
    assert read_index(source) == index
    sent = server.bytes_sent
    places = [Place(0, number) for number in (5, 0, 3, 6)]
    local, far = ShardReader(index, server.directory), ShardReader(index, {"toy": source})
    assert far.read_all("toy", "train", places) == local.read_all("toy", "train", places)
    (shard,) = index.dataset("toy").splits["train"]
    stops = [*shard.offsets[1:], shard.bytes]
    assert server.bytes_sent - sent == sum(stops[place.sample] - shard.offsets[place.sample] for place in places), (
        "no byte but those of the samples"
    )


@pytest.mark.parametrize("fault", [503, 500, 429, "drop"])
def test_what_fails_in_passing_is_tried_again(server: Server, index: Index, fault: int | str) -> None:
    server.fault = lambda number: fault if number % 3 else None
    far = ShardReader(index, {"toy": fast(server)})
    local = ShardReader(index, server.directory)
    for number in range(7):
        assert far.read("toy", "train", Place(0, number)) == local.read("toy", "train", Place(0, number))


@pytest.mark.parametrize("fault", [503, "drop"])
def test_what_goes_on_failing_names_the_url_and_how_often(server: Server, index: Index, fault: int | str) -> None:
    server.fault = lambda number: fault
    reader = ShardReader(index, {"toy": fast(server, attempts=4)})
    with pytest.raises(UserError, match=rf"^{server.url}/toy-train-000000.tar: cannot be read, 4 attempts") as caught:
        reader.read("toy", "train", Place(0, 0))
    assert not isinstance(caught.value, BadSample)
    assert len(server.requests) == 4


def test_a_copy_goes_on_from_where_the_connection_broke(
    server: Server, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 512)
    server.fault = lambda number: "drop" if number < 4 else None
    handle = io.BytesIO()
    (shard,) = index.dataset("toy").splits["train"]
    fast(server).copy(shard.name, handle, shard.bytes)
    assert handle.getvalue() == (server.directory / shard.name).read_bytes()
    assert server.bytes_sent < shard.bytes + 3 * 512, "nothing twice but the piece that was under way"
    server.ranges, server.requests = False, []
    handle = io.BytesIO()
    fast(server).copy(shard.name, handle, shard.bytes)
    assert handle.getvalue() == (server.directory / shard.name).read_bytes()


def test_pauses_grow_and_the_servers_own_are_kept(
    server: Server, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.fault = lambda number: 503
    for asked in (None, "7", "86400"):
        server.retry_after = asked
        with pytest.raises(UserError):
            HttpSource(server.url, attempts=4, backoff=1.0).copy(INDEX_NAME, io.BytesIO(), 1 << 20)
    own, theirs, bounded = pauses[:3], pauses[3:6], pauses[6:]
    assert [round(pause) >= low for pause, low in zip(own, (1, 2, 4), strict=True)] == [True] * 3
    assert own == sorted(own)
    assert max(own) < 5
    assert theirs == [7.0] * 3
    assert bounded == [30.0] * 3


def test_a_server_that_does_not_answer_is_an_error(index: Index, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        source = fast(server, attempts=2, timeout=1.0)
    with pytest.raises(UserError, match="cannot be read, 2 attempts failed"):
        ShardReader(index, {"toy": source}).read("toy", "train", Place(0, 0))


def test_answers_that_do_not_pass_are_errors_at_once(server: Server, index: Index) -> None:
    with pytest.raises(UserError, match=r"other\.json: the server answers with status 404"):
        fast(server).copy("other.json", io.BytesIO(), 10)
    with pytest.raises(UserError, match="more than the 10 bytes allowed"):
        fast(server).copy(INDEX_NAME, io.BytesIO(), 10)
    server.ranges = False
    reader = ShardReader(index, {"toy": fast(server)})
    with pytest.raises(UserError, match=r"gives no ranges of bytes.*--cache-dir"):
        reader.read("toy", "train", Place(0, 0))
    assert len(server.requests) == 3
    server.ranges = True
    local = ShardReader(index, server.directory).read("toy", "train", Place(0, 0))
    assert reader.read("toy", "train", Place(0, 0)) == local, "what was left of that answer is not read as the next"


def test_a_shard_of_another_size_than_the_index_says_is_an_error(server: Server, index: Index) -> None:
    path = server.directory / index.dataset("toy").splits["train"][0].name
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(UserError, match="Upload shards and index again"):
        ShardReader(index, {"toy": fast(server)}).read("toy", "train", Place(0, 0))


def test_a_password_is_sent_and_not_told(server: Server, index: Index) -> None:
    source = HttpSource(server.url.replace("http://", "http://anna:sec%40ret@"), attempts=1)
    read_index(source)
    assert server.headers_seen[-1]["authorization"] == "Basic YW5uYTpzZWNAcmV0"
    server.fault = lambda number: 403
    with pytest.raises(UserError) as caught:
        read_index(source)
    assert "sec" not in str(caught.value) + source.name


def test_a_pipe_gives_the_file_its_command_writes(index: Index, tmp_path: Path) -> None:
    assert read_index(CommandSource(f"pipe:cat {tmp_path}/{{}}")) == index


@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_pipe_over_a_bad_network(server: Server, index: Index, fault: int | str) -> None:
    fetch = "import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())"
    pipe = f"pipe:{shlex.quote(sys.executable)} -c {shlex.quote(fetch)} {server.url}/{{}} 2>/dev/null"
    server.fault = lambda number: fault if number < 3 else None
    assert read_index(CommandSource(pipe)) == index
    server.fault = lambda number: fault
    with pytest.raises(UserError, match=rf"{server.url}/index\.json.*3 attempts failed"):
        read_index(CommandSource(pipe))


def test_a_command_that_fails_is_run_again_and_then_named(index: Index, tmp_path: Path) -> None:
    log = tmp_path / "log"
    flaky = f"pipe:echo x >> {log}; [ $(wc -l < {log}) -ge 3 ] && cat {tmp_path}/{{}}"
    assert read_index(CommandSource(flaky)) == index
    with pytest.raises(UserError, match=r"^pipe:false index\.json: cannot be read, 3 attempts failed"):
        read_index(CommandSource("pipe:false {}"))
    with pytest.raises(UserError, match="more than the 5 bytes allowed"):
        CommandSource("pipe:yes {}").copy("x", io.BytesIO(), 5)
