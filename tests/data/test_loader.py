"""The DataLoader: the same batches on any ranks and with any workers, resumable anywhere; errors and warnings."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.data.collate import SHARED_MEMORY_BYTES, Batch, Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetTask, Index, load_index
from lvlm_clorae.data.loader import STOP_SIGNALS, ShardDataLoader
from lvlm_clorae.data.sampler import DistributedTaskBatchSampler, SampleRef, SamplingPlan
from lvlm_clorae.data.storage import FsspecStorage
from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor
from lvlm_clorae.training import preemption
from tests.helpers.server import serve
from tests.helpers.shards import SPEC, break_image, write_toy

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:This DataLoader will create")]

Shards = tuple[Path, Index]


@pytest.fixture(scope="module")
def shards(directory: Path, index: Index) -> Shards:
    return directory, index


def loader(
    shards: tuple[Any, Index], processor: Any, size: int = 4, policy: str = "error", workers: int = 0, **how: Any
) -> ShardDataLoader:
    """The loader of one rank; ``shards`` are their storages, or directory, and the index."""
    storages, index = shards
    dataset = ShardDataset(index, storages)
    dataset_tasks = {n: task for n, task in index.dataset_tasks("train").items() if n in how.pop("only", [n])}
    plan = SamplingPlan(0, size, how.pop("interleave", "proportional"))
    sampler = DistributedTaskBatchSampler(dataset, dataset_tasks, plan, **how)
    return ShardDataLoader(dataset, sampler, Collator(processor, dataset_tasks, on_invalid_sample=policy), workers)


def sampler_of(loader: ShardDataLoader) -> DistributedTaskBatchSampler:
    assert isinstance(loader.batch_sampler, DistributedTaskBatchSampler)
    return loader.batch_sampler


def is_same(first: Batch, second: Batch) -> bool:
    if (first.dataset_task, first.keys, first.is_padding) != (second.dataset_task, second.keys, second.is_padding):
        return False
    return all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def test_workers_change_neither_order_nor_content_nor_random_state(shards: Shards, processor: Processor) -> None:
    how: dict[str, Any] = {"rank": 1, "world_size": 2, "batch_size": 2}
    state = torch.get_rng_state()
    one = loader(shards, processor, **how)
    alone = list(one)
    assert len(alone) == len(one) == sampler_of(one).micro_step
    assert {batch.dataset_task.name for batch in alone} == set(shards[1].dataset_tasks("train"))
    for workers in (1, 3):
        together = list(loader(shards, processor, **how, workers=workers))
        assert len(together) == len(alone)
        assert all(map(is_same, alone, together))
    assert torch.equal(torch.get_rng_state(), state), "dropout must not depend on workers"


@pytest.mark.slow
def test_workers_may_be_spawned(shards: Shards, processor: Processor) -> None:
    alone = list(loader(shards, processor, only=["demo_news/entity"]))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = list(loader(shards, processor, only=["demo_news/entity"], workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(spawned) == len(alone)
    assert all(map(is_same, alone, spawned))


def test_workers_ignore_every_signal_that_stops_a_run() -> None:
    assert set(STOP_SIGNALS) == set(preemption.STOP_SIGNALS)


def test_small_tensors_cost_no_shared_memory_between_worker_and_parent() -> None:
    small, large = torch.arange(SHARED_MEMORY_BYTES // 8 - 1), torch.arange(SHARED_MEMORY_BYTES // 8)
    task = DatasetTask("toy/entity", "toy", "entity", "mner", [], None)
    batch = Batch(task, [], [], [], [], [], {"small": small, "large": large})
    state = batch.__getstate__()["tensors"]
    assert (isinstance(state["small"], torch.Tensor), isinstance(state["large"], torch.Tensor)) == (False, True)
    copied = pickle.loads(pickle.dumps(batch))
    assert all(torch.equal(copied.tensors[name], tensor) for name, tensor in batch.tensors.items())


# ---- properties over random shards


class Keys:
    """Stands in for a processor: the guarantees are about which samples are read, not about their tensors."""

    eos_token_id, reads_images = 0, True

    def prompt_tokens(self, prompt: str) -> int:
        return 0

    def encode(self, prompts: list[str], *rest: Any) -> dict[str, torch.Tensor]:
        return {"labels": torch.zeros(len(prompts), 1, dtype=torch.long)}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.sampled_from([1, 2, 4, 6, 12]))
    ways = [(ranks, batch) for ranks in range(1, 5) for batch in range(1, size + 1) if size % (ranks * batch) == 0]
    return {
        "counts": draw(st.tuples(st.integers(1, 25), st.integers(1, 25))),
        "max_samples": draw(st.integers(1, 9)),
        "size": size,
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
                write_toy(directory, replace(SPEC, name=name), (("train", count),), max_samples=max_samples)
            built[key] = directory, load_index(directory)
        return built[key]

    return get


Row = tuple[str, str, bool, bool]
"""Dataset task, key, is_padding, ignored."""


def read(
    shards: Shards, size: int, way: tuple[int, int], state: Any, steps: int | None, workers: int = 0
) -> tuple[list[Row], dict[str, Any]]:
    """The rows that all ranks read in a number of micro-steps, and the state after them."""
    ranks, batch_size = way
    loaders = [
        loader(shards, Keys(), size, rank=rank, world_size=ranks, batch_size=batch_size, workers=workers)
        for rank in range(ranks)
    ]
    if state is not None:
        for one in loaders:
            sampler_of(one).load_state_dict(json.loads(json.dumps(state)))
    rows: list[Row] = []
    iterators, number = list(map(iter, loaders)), 0
    while steps is None or number < steps:
        batches = [next(iterator, None) for iterator in iterators]
        if batches[0] is None:
            assert batches == [None] * ranks, "every rank has as many micro-steps"
            break
        number += 1
        assert len({batch.dataset_task.name for batch in batches}) == 1, "all ranks train the same dataset task"
        for batch in batches:
            assert len(batch.keys) == batch_size
            rows += zip(
                [batch.dataset_task.name] * batch_size, batch.keys, batch.is_padding, batch.ignored, strict=True
            )
    states = [sampler_of(one).state_dict() for one in loaders]
    assert all(other == states[0] for other in states)
    return rows, states[0]


@settings(max_examples=15, deadline=None)
@given(cases())
def test_every_sample_once_in_an_order_that_depends_on_no_rank_or_worker(many: Any, case: dict[str, Any]) -> None:
    shards = many(case["counts"], case["max_samples"])
    rows, _ = read(shards, case["size"], case["ways"][0], None, None)
    once = sorted((name, key) for name, key, is_padding, _ in rows if not is_padding)
    assert once == sorted(
        (f"{name}/entity", f"{number:06d}_toy")
        for name, count in zip(("first", "second"), case["counts"], strict=True)
        for number in range(count)
    )
    for way, workers in zip(case["ways"][1:], case["workers"], strict=True):
        assert read(shards, case["size"], way, None, None, workers)[0] == rows


@settings(max_examples=30, deadline=None)
@given(cases(), st.data())
def test_a_resume_of_a_resume_on_other_ranks_gives_the_rest(many: Any, case: dict[str, Any], data: Any) -> None:
    shards, size = many(case["counts"], case["max_samples"]), case["size"]
    whole, _ = read(shards, size, case["ways"][0], None, None)
    rows, state = read(shards, size, case["ways"][0], None, data.draw(st.integers(0, 12)))
    rest = (data.draw(st.integers(0, 12)), None)
    for way, steps, workers in zip(case["ways"][1:], rest, case["workers"], strict=True):
        more, state = read(shards, size, way, state, steps, workers)
        rows += [row for row in more if not row[3]]
    assert rows == whole


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_resume_of_a_resume_with_workers(many: Any, workers: int) -> None:
    shards = many((23, 9), 5)
    whole, _ = read(shards, 4, (2, 2), None, None)
    rng = random.Random(workers)
    rows, state = read(shards, 4, (2, 2), None, rng.randrange(1, 4), workers)
    more, state = read(shards, 4, (2, 2), state, rng.randrange(1, 4), 0)
    rest, _ = read(shards, 4, (2, 2), state, None, (workers + 1) % 4)
    assert rows + more + rest == whole


def test_a_resume_within_a_micro_step_ends_with_the_micro_step(many: Any) -> None:
    shards = many((23, 9), 5)
    whole, _ = read(shards, 12, (1, 12), None, None)
    rows, state = read(shards, 12, (1, 2), None, 1)
    more, state = read(shards, 12, (1, 12), state, 1)
    assert state["consumed_samples"] == 12
    assert [row[3] for row in more] == [True] * 2 + [False] * 10
    rest, _ = read(shards, 12, (2, 3), state, None)
    assert rows + more[2:] + rest == whole


def test_a_loader_reads_what_is_left_of_the_epoch(many: Any) -> None:
    one = loader(many((5, 9), 5), Keys(), 4, batch_size=4)
    sampler = sampler_of(one)
    for consumed in range(len(one) * 4 + 1):
        sampler.consumed_samples = consumed
        left = len(one) - sampler.micro_step
        assert len(list(one)) == left
        assert (sampler.consumed_samples, sampler.micro_step) == (len(one) * 4, len(one))


def test_forked_workers_open_their_own_connections(shards: Shards) -> None:
    directory, index = shards
    with serve(directory) as server:
        storage = FsspecStorage(server.url)
        storage.attempts, storage.deadline = 1, 10.0
        storages = dict.fromkeys(index.datasets, storage)
        ShardDataset(index, storages)[SampleRef("demo_news/entity", 0, 0)]  # the parent's connection stays open

        def keys(storages: Any, workers: int) -> list[list[str]]:
            return [batch.keys for batch in loader((storages, index), Keys(), batch_size=4, workers=workers)]

        assert keys(storages, 3) == keys(directory, 0)


# ---- errors and invalid samples


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("is_missing", [False, True])
def test_an_error_names_the_shard_without_a_traceback(
    tmp_path: Path, processor: Processor, workers: int, is_missing: bool
) -> None:
    index = write_toy(tmp_path)
    name = break_image(tmp_path, index)
    if is_missing:
        (tmp_path / name).unlink()
    message = name if is_missing else f"^{name}, 000004_toy: its image"
    with pytest.raises(UserError, match=message) as caught:
        list(loader((tmp_path, index), processor, size=1, workers=workers))
    assert "Traceback" not in str(caught.value)
    for worker in multiprocessing.active_children():  # the end of the process would wait for them
        worker.join(10)
        assert not worker.is_alive()


def test_a_missing_shard_is_an_error_under_every_policy(tmp_path: Path, processor: Processor) -> None:
    index = write_toy(tmp_path)
    (tmp_path / index.dataset("toy").splits["train"][0].name).unlink()
    for policy in ("skip", "blank"):
        with pytest.raises(UserError, match="toy-train-000000"):
            list(loader((tmp_path, index), processor, size=1, policy=policy))


@pytest.mark.parametrize("policy", ["skip", "blank"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_the_same_length_under_every_policy(
    tmp_path: Path, processor: Processor, policy: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    index = write_toy(tmp_path, counts=(("train", 12),))
    break_image(tmp_path, index)
    loaders = [
        loader((tmp_path, index), processor, 4, policy, workers, rank=rank, world_size=2, batch_size=2)
        for rank in range(2)
    ]
    by_rank = [list(one) for one in loaders]
    assert [len(batches) for batches in by_rank] == [3, 3]
    assert sum(one.invalid_samples for one in loaders) == 1
    assert len([message for message in caplog.messages if "000004_toy" in message]) == 1
    batches = [batch for batches in by_rank for batch in batches]
    assert sum(len(batch.invalid) for batch in batches) == 1
    assert sum(sum(batch.ignored) for batch in batches) == (policy == "skip")
    keys = sorted(key for batch in batches for key in batch.keys if key)
    assert keys == [f"{number:06d}_toy" for number in range(12) if policy == "blank" or number != 4]


def test_warnings_of_invalid_samples_become_rarer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "shards"
    index = write_toy(directory, counts=(("train", 100),))
    (shard,) = index.dataset("toy").splits["train"]
    data = (directory / shard.name).read_bytes()
    (directory / shard.name).write_bytes(data.replace(b'"text":"Anna', b'"text":"Anne'))
    one = loader((directory, index), Keys(), policy="skip")
    with caplog.at_level(logging.WARNING):
        for epoch in range(5):
            sampler_of(one).set_epoch(epoch)
            assert all(all(batch.ignored) for batch in one)
    assert one.invalid_samples == 500
    assert 5 < len(caplog.records) < 15
    sampler_of(one).set_epoch(5)
    with pytest.raises(UserError, match="501 of the last 501 samples"):
        list(one)


class Stuck(Keys):
    """Does not answer from the third batch of a worker on, or kills it."""

    def __init__(self, kill: bool) -> None:
        self.kill, self.calls = kill, 0

    def encode(self, prompts: list[str], *rest: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls > 2 and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls > 2:
            time.sleep(600)
        return super().encode(prompts, *rest)


def test_a_killed_worker_is_an_error_that_names_it(shards: Shards) -> None:
    with pytest.raises(UserError, match=r"processes \d+\) ended: "):
        list(loader(shards, Stuck(kill=True), workers=1))


def test_a_silent_worker_is_an_error_after_the_timeout(shards: Shards) -> None:
    others = set(multiprocessing.active_children())
    one = loader(shards, Stuck(kill=False), workers=1)
    one._seconds = 1.0
    with pytest.raises(UserError, match="do not answer"):
        list(one)
    for child in set(multiprocessing.active_children()) - others:
        child.join(5)
        assert not child.is_alive()


def test_an_iteration_can_be_left_while_a_worker_holds_the_lock_of_the_shutdown(shards: Shards) -> None:
    """A killed worker never releases it."""
    iteration = iter(loader(shards, Keys(), workers=1))
    next(iteration)
    batches = iteration.gi_frame.f_locals["batches"]  # type: ignore[attr-defined]
    assert batches._workers_done_event._cond.acquire(timeout=5)

    def leave() -> None:
        iteration.close()  # type: ignore[attr-defined]
        batches.__del__()

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    (worker,) = batches._workers
    worker.join(5)
    assert not worker.is_alive()


class Asked(Exception):
    pass


def test_a_request_to_stop_is_answered_while_waiting(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm_clorae.data.loader.PATIENCE", 0.1)
    one, requests = loader(shards, Stuck(kill=False), workers=1), []

    def stop() -> None:
        requests.append(time.monotonic())
        if len(requests) == 2:
            raise Asked

    one._while_waiting = stop
    with pytest.raises(Asked):
        list(one)
    assert len(requests) == 2
