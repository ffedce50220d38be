"""The training stream: every sample once, alike on all ranks and with any workers, resumable anywhere, twice."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.data.batches import Batch, Batcher
from lvlm_clorae.data.plan import Order, Place
from lvlm_clorae.data.remote import HttpSource
from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.shards import Index, load_index
from lvlm_clorae.data.sources import Source
from lvlm_clorae.data.stream import BadSamples, TrainingStream
from lvlm_clorae.data.units import Unit, find_units
from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor
from tests.data.helpers import SPEC, write_toy
from tests.data.server import serve
from tests.data.test_batches import break_picture
from tests.launch import small_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

Shards = tuple[Path, Index]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    directory = small_shards(tmp_path_factory.mktemp("stream") / "shards", train=12, dev=5, test=2)
    return directory, load_index(directory)


def stream_of(shards: Shards, processor: Any, block: int = 4, policy: str = "error", **how: Any) -> TrainingStream:
    directory, index = shards
    batcher = Batcher(ShardReader(index, directory), processor, "train", on_bad_sample=policy)
    order = Order(0, block, how.pop("interleave", "proportional"))
    return TrainingStream(batcher, how.pop("units", find_units(index, "train")), order, **how)


def same(first: Batch, second: Batch) -> bool:
    if (first.unit, first.keys, first.wrapped) != (second.unit, second.keys, second.wrapped):
        return False
    return all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def test_workers_change_neither_order_nor_content(shards: Shards, processor: Processor) -> None:
    how: dict[str, Any] = {"rank": 1, "world_size": 2, "micro_batch": 2}
    state = torch.get_rng_state()
    stream = stream_of(shards, processor, **how)
    alone = list(stream)
    assert len(alone) == len(stream) == stream.micro_step
    assert {batch.unit.name for batch in alone} == set(find_units(shards[1], "train"))
    for workers in (1, 3):
        together = list(stream_of(shards, processor, **how, workers=workers))
        assert len(together) == len(alone)
        assert all(map(same, alone, together))
    assert torch.equal(torch.get_rng_state(), state), "dropout must not depend on workers"


def test_workers_may_be_spawned(shards: Shards, processor: Processor) -> None:
    alone = list(stream_of(shards, processor, units=news(shards)))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = list(stream_of(shards, processor, units=news(shards), workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(spawned) == len(alone)
    assert all(map(same, alone, spawned))


def news(shards: Shards) -> dict[str, Unit]:
    return {name: unit for name, unit in find_units(shards[1], "train").items() if name == "demo_news/entity"}


# ---- properties over random shards


class Keys:
    """In a processor's place: the stream's guarantees are about which samples, not about their tensors."""

    def __call__(self, prompts: list[str], *rest: Any, **limits: Any) -> dict[str, torch.Tensor]:
        return {"labels": torch.zeros(len(prompts), 1, dtype=torch.long)}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    block = draw(st.sampled_from([1, 2, 4, 6, 12]))
    ways = [(ranks, size) for ranks in range(1, 5) for size in range(1, block + 1) if block % (ranks * size) == 0]
    return {
        "counts": draw(st.tuples(st.integers(1, 25), st.integers(1, 25))),
        "max_samples": draw(st.integers(1, 9)),
        "block": block,
        "ways": [draw(st.sampled_from(ways)) for _ in range(3)],
        "workers": draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
    }


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Shards of two datasets, built once for each pair of counts and shard size."""
    built: dict[Any, Shards] = {}

    def get(counts: tuple[int, int], max_samples: int) -> Shards:
        key = counts, max_samples
        if key not in built:
            directory = tmp_path_factory.mktemp("many")
            for name, count in zip(("first", "second"), counts, strict=True):
                spec = replace(SPEC, name=name)
                write_toy(directory, spec, (("train", count),), max_samples=max_samples)
            built[key] = directory, load_index(directory)
        return built[key]

    return get


def read(shards: Shards, case: dict[str, Any], way: tuple[int, int], state: Any, steps: int | None, workers: int = 0):
    """What all ranks read in so many micro-steps: (unit, key, wrapped, ignored) a row, and the state after it."""
    ranks, size = way
    streams = [
        stream_of(shards, Keys(), case["block"], rank=rank, world_size=ranks, micro_batch=size, workers=workers)
        for rank in range(ranks)
    ]
    for stream in streams:
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
    iterators, rows, number = [iter(stream) for stream in streams], [], 0
    while steps is None or number < steps:
        batches = [next(iterator, None) for iterator in iterators]
        if batches[0] is None:
            assert batches == [None] * ranks, "every rank has as many micro-steps"
            break
        number += 1
        assert len({batch.unit.name for batch in batches}) == 1, "all ranks train the same unit"
        for batch in batches:
            assert len(batch.keys) == size
            rows += zip([batch.unit.name] * size, batch.keys, batch.wrapped, batch.ignored, strict=True)
    states = [stream.state_dict() for stream in streams]
    assert all(other == states[0] for other in states)
    return rows, states[0]


@settings(max_examples=30, deadline=None)
@given(cases())
def test_every_sample_once_and_the_order_depends_on_no_rank(many: Any, case: dict[str, Any]) -> None:
    shards = many(case["counts"], case["max_samples"])
    rows, _ = read(shards, case, case["ways"][0], None, None)
    once = sorted((unit, key) for unit, key, wrapped, _ in rows if not wrapped)
    assert once == sorted(
        (f"{name}/entity", f"{number:06d}_toy")
        for name, count in zip(("first", "second"), case["counts"], strict=True)
        for number in range(count)
    )
    for way, workers in zip(case["ways"][1:], case["workers"], strict=True):
        assert read(shards, case, way, None, None, workers)[0] == rows


@settings(max_examples=30, deadline=None)
@given(cases(), st.data())
def test_a_resume_of_a_resume_on_other_ranks_gives_the_rest(many: Any, case: dict[str, Any], data: Any) -> None:
    shards = many(case["counts"], case["max_samples"])
    whole, _ = read(shards, case, case["ways"][0], None, None)
    rows, state = read(shards, case, case["ways"][0], None, data.draw(st.integers(0, 12)))
    rest = (data.draw(st.integers(0, 12)), None)
    for way, steps, workers in zip(case["ways"][1:], rest, case["workers"], strict=True):
        more, state = read(shards, case, way, state, steps, workers)
        rows += [row for row in more if not row[3]]
    assert rows == whole


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_resume_of_a_resume_with_workers(many: Any, workers: int) -> None:
    case: dict[str, Any] = {"block": 4}
    shards = many((23, 9), 5)
    whole, _ = read(shards, case, (2, 2), None, None)
    rng = random.Random(workers)
    rows, state = read(shards, case, (2, 2), None, rng.randrange(1, 4), workers)
    more, state = read(shards, case, (2, 2), state, rng.randrange(1, 4), 0)
    rest, _ = read(shards, case, (2, 2), state, None, (workers + 1) % 4)
    assert rows + more + rest == whole


def test_a_resume_within_a_micro_step_ends_where_the_micro_step_ends(many: Any) -> None:
    case: dict[str, Any] = {"block": 12}
    shards = many((23, 9), 5)
    whole, _ = read(shards, case, (1, 12), None, None)
    rows, state = read(shards, case, (1, 2), None, 1)
    more, state = read(shards, case, (1, 12), state, 1)
    assert state["done"] == 12
    assert [row[3] for row in more] == [True] * 2 + [False] * 10
    rest, _ = read(shards, case, (2, 3), state, None)
    assert rows + more[2:] + rest == whole


def test_wherever_it_stands_a_stream_knows_how_much_is_left(many: Any) -> None:
    stream = stream_of(many((5, 9), 5), Keys(), 4, micro_batch=4)
    for done in range(len(stream) * 4 + 1):
        stream.done = done
        left = len(stream) - stream.micro_step
        assert len(list(stream)) == left
        assert (stream.done, stream.micro_step) == (len(stream) * 4, len(stream))


def test_forked_workers_do_not_speak_into_their_parents_connection(shards: Shards) -> None:
    directory, index = shards
    with serve(directory) as server:
        sources: dict[str, Source] = dict.fromkeys(index.datasets, HttpSource(server.url, attempts=1, timeout=10.0))
        reader = ShardReader(index, sources)
        reader.read("demo_news", "train", Place(0, 0))  # the parent's connection stays open

        def batches(sources: Any, workers: int) -> list[list[str]]:
            batcher = Batcher(ShardReader(index, sources), Keys(), "train")
            stream = TrainingStream(batcher, find_units(index, "train"), Order(0, 4), micro_batch=4, workers=workers)
            return [batch.keys for batch in stream]

        assert batches(sources, 3) == batches(directory, 0)


# ---- state


def test_the_state_is_small_and_goes_over_epochs(shards: Shards, processor: Processor) -> None:
    stream = stream_of(shards, Keys(), micro_batch=2)
    first = [batch.keys for batch in stream]
    stream.next_epoch()
    iterator = iter(stream)
    second = [next(iterator).keys for _ in range(3)]
    state = stream.state_dict()
    assert (state["epoch"], state["done"]) == (1, 6)
    assert len(json.dumps(state)) < 400
    resumed = stream_of(shards, Keys(), micro_batch=2)
    resumed.load_state_dict(state)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in iterator]
    assert second != first[:3]


def test_the_order_of_a_state_wins_over_the_settings(shards: Shards) -> None:
    stream = stream_of(shards, Keys(), block=4, interleave="balanced", micro_batch=2)
    whole = [batch.keys for batch in stream]
    stream.done = 0
    other = stream_of(shards, Keys(), block=2, micro_batch=2)
    other.load_state_dict(stream.state_dict())
    assert [batch.keys for batch in other] == whole


def test_states_that_do_not_fit_say_what_to_do(shards: Shards, tmp_path: Path) -> None:
    stream = stream_of(shards, Keys())
    state = stream.state_dict()
    with pytest.raises(UserError, match="version 99, but this program reads 1"):
        stream.load_state_dict({**state, "version": 99})
    with pytest.raises(UserError, match="training shards of demo_news are not those that the run began with"):
        stream.load_state_dict({**state, "data": {**state["data"], "demo_news": "0" * 16}})
    wide = stream_of(shards, Keys(), block=6, world_size=3, micro_batch=2)
    with pytest.raises(UserError, match=r"block of 4 samples cannot be shared by 3 ranks of micro-batch 2.*divides 4"):
        wide.load_state_dict(state)
    with pytest.raises(UserError, match="block of 4 samples cannot be shared"):
        stream_of(shards, Keys(), block=4, world_size=3)


# ---- bad samples


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_ends_the_stream_with_shard_and_key(
    tmp_path: Path, processor: Processor, workers: int
) -> None:
    index = write_toy(tmp_path)
    name = break_picture(tmp_path, index)
    with pytest.raises(UserError, match=rf"^{name}, 000004_toy: its picture cannot be decoded") as caught:
        list(stream_of((tmp_path, index), processor, block=1, workers=workers))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("policy", ["skip", "blank"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_stays_as_long_under_every_policy(
    tmp_path: Path, processor: Processor, policy: str, workers: int
) -> None:
    index = write_toy(tmp_path, counts=(("train", 12),))
    break_picture(tmp_path, index)
    by_rank = [
        list(
            stream_of((tmp_path, index), processor, 4, policy, rank=rank, world_size=2, micro_batch=2, workers=workers)
        )
        for rank in range(2)
    ]
    assert [len(batches) for batches in by_rank] == [3, 3]
    batches = [batch for batches in by_rank for batch in batches]
    assert sum(len(batch.bad) for batch in batches) == 1
    assert sum(sum(batch.ignored) for batch in batches) == (policy == "skip")
    keys = sorted(key for batch in batches for key in batch.keys if key)
    assert keys == [f"{number:06d}_toy" for number in range(12) if policy == "blank" or number != 4]


def test_warnings_of_bad_samples_become_rarer(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadSamples()
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            bad.add([f"sample {number}"])
    assert bad.count == 1000
    assert len(caplog.records) < 15
    assert caplog.messages[0] == "bad sample 1: sample 0"
