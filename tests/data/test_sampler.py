"""The sampling plan and the batch samplers: every sample once, the same order on any ranks, resumable anywhere."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetSpec, DatasetTask, Index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.sampler import (
    DatasetTaskPass,
    DistributedTaskBatchSampler,
    EpochPlan,
    SampleRef,
    SamplingPlan,
    evaluation_batches,
    text_lengths,
)
from lvlm_clorae.errors import UserError
from tests.helpers.shards import TYPES, break_json, write_toy

Cut = tuple[int, int]
"""Ranks and samples per rank."""

shard_sizes = st.dictionaries(
    st.sampled_from(["news/entity", "pairs/relation", "m2e2/trigger", "m2e2/argument"]),
    st.lists(st.integers(1, 13), min_size=1, max_size=5),
    min_size=1,
    max_size=3,
)
seeds = st.integers(0, 1 << 40)


@st.composite
def cuts(draw: st.DrawFn, count: int = 1) -> tuple[int, list[Cut]]:
    """A global micro-batch, and ``count`` ways to cut it into micro-steps."""
    size = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    ways = [(ranks, batch) for ranks in range(1, 5) for batch in range(1, size + 1) if size % (ranks * batch) == 0]
    return size, [draw(st.sampled_from(ways)) for _ in range(count)]


def by_rank(plan: EpochPlan, cut: Cut, consumed: int = 0) -> list[list[list[SampleRef]]]:
    """The micro-batches of every rank."""
    ranks, batch_size = cut
    return [list(plan.micro_batches(rank, ranks, batch_size, consumed)) for rank in range(ranks)]


def joined(plan: EpochPlan, cut: Cut, consumed: int = 0) -> list[SampleRef]:
    """The samples of all ranks, in the order of micro-steps and ranks."""
    return [ref for step in zip(*by_rank(plan, cut, consumed), strict=True) for batch in step for ref in batch]


def times_read(refs: list[SampleRef]) -> Counter[tuple[str, int, int]]:
    return Counter((ref.dataset_task, ref.shard, ref.sample) for ref in refs if not ref.is_padding)


def every_sample(sizes: dict[str, list[int]]) -> list[tuple[str, int, int]]:
    return [(name, n, k) for name, counts in sizes.items() for n, size in enumerate(counts) for k in range(size)]


# ---- the sampling plan


@given(shard_sizes, cuts(), seeds, st.integers(0, 3))
def test_every_sample_once_and_padding_only_in_the_last_step_of_a_dataset_task(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int, epoch: int
) -> None:
    size, [cut] = way
    read = joined(EpochPlan(sizes, SamplingPlan(seed, size), epoch), cut)
    assert times_read(read) == Counter(every_sample(sizes))
    batches = [read[start : start + size] for start in range(0, len(read), size)]
    for number, refs in enumerate(batches):
        (name,) = {ref.dataset_task for ref in refs}
        is_last = all(name != later[0].dataset_task for later in batches[number + 1 :])
        assert sum(ref.is_padding for ref in refs) == (-sum(sizes[name]) % size if is_last else 0)
        for ref in refs:
            assert 0 <= ref.sample < sizes[name][ref.shard]


@given(shard_sizes, cuts(), seeds)
def test_all_ranks_read_the_same_dataset_task_and_as_many_samples(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int
) -> None:
    size, [cut] = way
    plan = EpochPlan(sizes, SamplingPlan(seed, size), 0)
    ranks = by_rank(plan, cut)
    assert {len(batches) for batches in ranks} == {len(plan) * size // (cut[0] * cut[1])}
    for step in zip(*ranks, strict=True):
        assert len({ref.dataset_task for batch in step for ref in batch}) == 1
        assert {len(batch) for batch in step} == {cut[1]}


@given(shard_sizes, cuts(count=2), seeds)
def test_the_order_does_not_depend_on_ranks_and_batch_size(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int
) -> None:
    size, [one, other] = way
    plans = [EpochPlan(sizes, SamplingPlan(seed, size), 0) for _ in range(2)]
    assert joined(plans[0], one) == joined(plans[1], other)


@given(shard_sizes, cuts(), seeds, st.data())
def test_resuming_twice_gives_the_rest(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int, data: st.DataObject
) -> None:
    size, [(ranks, batch_size)] = way
    rank = data.draw(st.integers(0, ranks - 1))

    def part(start: int, count: int | None) -> list[list[SampleRef]]:
        """The micro-batches of a new process that starts after ``start`` micro-steps and is killed after ``count``."""
        plan = EpochPlan(sizes, SamplingPlan(seed, size), 1)
        return list(islice(plan.micro_batches(rank, ranks, batch_size, start * ranks * batch_size), count))

    whole = part(0, None)
    first = data.draw(st.integers(0, len(whole)))
    second = data.draw(st.integers(first, len(whole)))
    assert part(0, first) + part(first, second - first) + part(second, None) == whole


@given(shard_sizes, cuts(count=3), seeds, st.data())
def test_resuming_anywhere_on_other_ranks_twice_gives_the_rest(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int, data: st.DataObject
) -> None:
    size, ways = way
    plan = EpochPlan(sizes, SamplingPlan(seed, size), 0)
    read: list[SampleRef] = []
    consumed = 0
    for is_last, (ranks, batch_size) in zip((False, False, True), ways, strict=True):
        width = ranks * batch_size
        rest = joined(plan, (ranks, batch_size), consumed)
        stop = len(rest) if is_last else data.draw(st.integers(0, len(rest) // width)) * width
        before = consumed % width
        if stop:
            assert [ref.is_consumed for ref in rest] == [number < before for number in range(len(rest))]
            consumed += stop - before
        read += [ref for ref in rest[:stop] if not ref.is_consumed]
    assert read == joined(plan, ways[0])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), cuts(), seeds)
def test_all_ranks_together_read_each_shard_about_once(sizes: list[int], way: tuple[int, list[Cut]], seed: int) -> None:
    size, [cut] = way
    ranks = by_rank(EpochPlan({"a/entity": sizes}, SamplingPlan(seed, size), 0), cut)
    touched = {
        (rank, ref.shard)
        for rank, batches in enumerate(ranks)
        for batch in batches
        for ref in batch
        if not ref.is_padding
    }
    # A rank's partitions are size / (ranks * batch_size) runs of batch_size neighbours. Runs and shards both cut one
    # line into pieces, so there are at most runs + shards - 1 pairs of a run that overlaps a shard.
    runs = size // cut[1]
    assert len(touched) <= len(sizes) + runs - 1


@given(st.integers(1, 60), st.integers(1, 12), seeds)
def test_a_partition_is_one_run_of_the_permuted_shards(samples: int, size: int, seed: int) -> None:
    sizes = [samples // 3 + 1, samples, samples // 2 + 1]
    one = DatasetTaskPass("a/entity", sizes, size, seed, 0)
    shards: list[int] = []
    for partition in range(size):
        refs = [one.sample_ref(step, partition) for step in range(one.steps)]
        read = [ref for ref in refs if not ref.is_padding]
        assert len(read) in (one.samples // size, -(-one.samples // size))
        shards += [ref.shard for ref in read]
    assert sum(a != b for a, b in pairwise(shards)) == len(sizes) - 1


@settings(max_examples=40)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.sampled_from([1, 2, 4]), seeds)
def test_dataset_tasks_are_interleaved_in_proportion(samples: list[int], size: int, seed: int) -> None:
    plan = EpochPlan({f"a{n}/entity": [count] for n, count in enumerate(samples)}, SamplingPlan(seed, size), 0)
    total = len(plan)
    counts: Counter[str] = Counter()
    for number, (name, step) in enumerate(map(plan.global_micro_batch, range(total)), start=1):
        assert step == counts[name], "a dataset task's own steps are in order"
        counts[name] += 1
        for other, steps in plan.steps.items():
            share = steps / total
            # At one moment of the epoch each count is less than 1 off; so is n, times the number of dataset tasks.
            bound = (1 - share) + share * (len(samples) - 1)
            assert abs(counts[other] - number * share) < bound + 1e-9
    assert counts == plan.steps


def test_every_window_of_the_demo_has_its_dataset_tasks_in_proportion() -> None:
    sizes = {"posts": [300], "news": [100], "pairs": [200], "trigger": [140], "argument": [140]}
    for seed in range(5):
        plan = EpochPlan(sizes, SamplingPlan(seed, 8), 0)
        names = [plan.global_micro_batch(number)[0] for number in range(len(plan))]
        for start in range(len(names) - 15):
            window = Counter(names[start : start + 16])
            for name, steps in plan.steps.items():
                assert abs(window[name] - 16 * steps / len(names)) < 2


def test_epochs_seeds_and_dataset_tasks_have_different_orders() -> None:
    def order(name: str = "a/entity", seed: int = 0, epoch: int = 0) -> list[tuple[int, int]]:
        refs = joined(EpochPlan({name: [20, 20, 20]}, SamplingPlan(seed, 4), epoch), (1, 4))
        return [(ref.shard, ref.sample) for ref in refs]

    orders = [order(), order(epoch=1), order(epoch=2), order(seed=1), order(seed=10), order("b/entity")]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])
    assert order() == order()


def test_the_order_is_pinned() -> None:
    """Another order would break the resumption of earlier runs: change it only on purpose."""
    plan = EpochPlan({"a/entity": [3, 4], "b/relation": [3]}, SamplingPlan(7, 2), 1)
    assert [(*ref[:3], ref.is_padding) for ref in joined(plan, (2, 1))] == [
        ("a/entity", 0, 0, False),
        ("a/entity", 1, 2, False),
        ("b/relation", 0, 0, False),
        ("b/relation", 0, 1, False),
        ("a/entity", 0, 1, False),
        ("a/entity", 1, 0, False),
        ("a/entity", 0, 2, False),
        ("a/entity", 1, 3, False),
        ("b/relation", 0, 0, True),
        ("b/relation", 0, 2, False),
        ("a/entity", 0, 0, True),
        ("a/entity", 1, 1, False),
    ]


@pytest.mark.parametrize(
    ("plan", "epoch", "cut", "consumed", "rows", "digest"),
    [
        (SamplingPlan(0, 8), 0, (2, 2), 0, 144, "606f2769c78ef226"),
        (SamplingPlan(7, 12), 3, (1, 3), 30, 114, "35c7271483119ce9"),
        (SamplingPlan(1, 4, "balanced"), 1, (2, 2), 0, 176, "f9e3e67ff50aea8e"),
        (SamplingPlan(123456789, 6, "temperature", 3.0), 2, (3, 1), 9, 159, "3e47ffcfb3e6253f"),
        (SamplingPlan(5, 1, "temperature", 1.5), 0, (1, 1), 0, 133, "10680b6ec9c74fa8"),
    ],
)
def test_the_orders_of_the_first_release_are_pinned(
    plan: SamplingPlan, epoch: int, cut: Cut, consumed: int, rows: int, digest: str
) -> None:
    """Digests of the orders before the samplers took their present form."""
    sizes = {"news/entity": [5, 13, 1, 8], "pairs/relation": [9], "m2e2/trigger": [40, 3], "m2e2/argument": [40, 3]}
    read = [list(ref) for ref in joined(EpochPlan(sizes, plan, epoch), cut, consumed)]
    assert len(read) == rows
    assert hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16] == digest


@given(shard_sizes, cuts(), seeds, st.sampled_from(["balanced", "temperature"]), st.floats(1, 8))
def test_other_interleaves_repeat_whole_passes(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int, interleave: str, temperature: float
) -> None:
    """Samples of a dataset task come equally often, up to one; those of the largest dataset task once."""
    size, [cut] = way
    plan = EpochPlan(sizes, SamplingPlan(seed, size, interleave, temperature), 0)
    read = joined(plan, cut)
    assert len(read) == sum(plan.steps.values()) * size
    seen = times_read(read)
    largest = max(-(-sum(counts) // size) for counts in sizes.values())
    for name, counts in sizes.items():
        times = [seen[sample] for sample in every_sample({name: counts})]
        assert min(times) >= 1
        assert max(times) - min(times) <= 1
        if -(-sum(counts) // size) == largest:
            assert set(times) == {1}
        if interleave == "balanced":
            assert plan.steps[name] == largest


def test_temperature_goes_from_proportional_to_balanced() -> None:
    sizes = {"a": [400], "b": [100], "c": [4]}

    def steps(interleave: str, temperature: float = 2.0) -> list[int]:
        return list(EpochPlan(sizes, SamplingPlan(0, 4, interleave, temperature), 0).steps.values())

    assert steps("proportional") == steps("temperature", 1.0) == [100, 25, 1]
    assert steps("temperature", 2.0) == [100, 50, 10]
    assert steps("temperature", 1e9) == steps("balanced") == [100, 100, 100]


def test_every_pass_has_another_order() -> None:
    plan = EpochPlan({"large": [200], "small": [40]}, SamplingPlan(0, 4, "balanced"), 0)
    small = [ref.sample for ref in joined(plan, (1, 4)) if ref.dataset_task == "small"]
    passes = [small[start : start + 40] for start in range(0, 200, 40)]
    assert all(sorted(order) == list(range(40)) for order in passes)
    assert len({tuple(order) for order in passes}) == 5


# ---- the sampler of training


def sampler(dataset: ShardDataset, size: int = 4, **how: Any) -> DistributedTaskBatchSampler:
    plan = SamplingPlan(0, size, how.pop("interleave", "proportional"))
    return DistributedTaskBatchSampler(dataset, dataset.index.dataset_tasks("train"), plan, **how)


def test_the_position_moves_by_advance_and_not_by_iteration(dataset: ShardDataset) -> None:
    one = sampler(dataset, batch_size=2)
    whole = list(one)
    assert len(whole) == len(one)
    assert (one.consumed_samples, list(one)) == (0, whole), "workers read ahead of training"
    for done in range(len(one) + 1):
        assert one.micro_step == done
        assert list(one) == whole[done:]
        one.advance()


def test_the_state_is_small_and_continues_in_a_later_epoch(dataset: ShardDataset) -> None:
    one = sampler(dataset, batch_size=2)
    first = list(one)
    one.set_epoch(1)
    second = list(one)
    assert second != first
    for _ in range(3):
        one.advance()
    state = one.state_dict()
    assert (state["epoch"], state["consumed_samples"]) == (1, 6)
    assert len(json.dumps(state)) < 400
    resumed = sampler(dataset, batch_size=2)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert list(resumed) == second[3:]


def test_the_plan_of_a_state_wins_over_the_settings(dataset: ShardDataset) -> None:
    one = sampler(dataset, size=4, interleave="balanced", batch_size=2)
    other = sampler(dataset, size=2, batch_size=2)
    assert list(other) != list(one)
    other.load_state_dict(one.state_dict())
    assert list(other) == list(one)


def test_states_that_do_not_fit_are_rejected(dataset: ShardDataset) -> None:
    one = sampler(dataset)
    state = one.state_dict()
    with pytest.raises(UserError, match="version 99"):
        one.load_state_dict({**state, "version": 99})
    with pytest.raises(UserError, match="demo_news"):
        one.load_state_dict({**state, "shards": {**state["shards"], "demo_news": "0" * 16}})
    wide = sampler(dataset, size=6, world_size=3, batch_size=2)
    with pytest.raises(UserError, match=r"of 4 samples.*3 ranks"):
        wide.load_state_dict(state)
    with pytest.raises(UserError, match=r"of 4 samples.*3 ranks"):
        sampler(dataset, size=4, world_size=3)


# ---- the batches of evaluation

DATASET_TASK = DatasetTask("toy/entity", "toy", "entity", "mner", TYPES, None)


def test_the_lengths_of_all_ranks_add_up_to_those_of_the_texts(
    directory: Path, index: Index, dataset: ShardDataset
) -> None:
    dataset_tasks = index.dataset_tasks("train").values()
    parts = [text_lengths(dataset, dataset_tasks, rank, 3) for rank in range(3)]
    assert list(parts[0]) == list(index.datasets)
    for name in index.datasets:
        texts = [sample["text"] for _, sample, _ in read_samples(directory, index, name, "train")]
        assert [sum(lengths) for lengths in zip(*(part[name] for part in parts), strict=True)] == list(map(len, texts))


def test_every_sample_once_longest_texts_first_one_dataset_task_a_batch(index: Index, dataset: ShardDataset) -> None:
    dataset_tasks = index.dataset_tasks("train")
    lengths = text_lengths(dataset, dataset_tasks.values(), 0, 1)
    batches = evaluation_batches(dataset, dataset_tasks.values(), lengths, 5)
    assert all(len({ref.dataset_task for ref in batch}) == 1 for batch in batches)
    refs = [ref for batch in batches for ref in batch]
    assert len(set(refs)) == len(refs)
    for name, dataset_task in dataset_tasks.items():
        own = [ref for ref in refs if ref.dataset_task == name]
        written = dataset.refs(name)
        assert sorted(own) == written
        length = [lengths[dataset_task.dataset][written.index(ref)] for ref in own]
        assert length == sorted(length, reverse=True)
        assert len(set(length)) > 1
        assert sum(ref.dataset_task == name for ref, *_ in batches) == -(-len(own) // 5)


def test_an_invalid_sample_has_length_zero_and_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    index = write_toy(tmp_path)
    break_json(tmp_path, index, 2)
    lengths = text_lengths(ShardDataset(index, tmp_path), [DATASET_TASK], 0, 1)["toy"]
    assert [number for number, length in enumerate(lengths) if not length] == [2]
    (tmp_path / index.dataset("toy").splits["train"][0].name).unlink()
    with pytest.raises(UserError, match="toy-train-000000"):
        text_lengths(ShardDataset(index, tmp_path), [DATASET_TASK], 0, 1)


class Refs:
    """Stands in for a dataset with one shard."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def refs(self, dataset_task: str) -> list[SampleRef]:
        return [SampleRef(dataset_task, 0, sample) for sample in range(self.samples)]


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 7))
def test_ranks_share_the_same_batches_and_each_has_as_many(samples: int, size: int, ranks: int) -> None:
    dataset: Any = Refs(samples)
    how: Any = (dataset, [DATASET_TASK], {"toy": [1] * samples}, size)
    whole = evaluation_batches(*how)
    shares = [evaluation_batches(*how, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1, "under ZeRO-3 a rank with fewer would leave the others waiting"
    batches = [batch for share in shares for batch in share]
    padding = [batch for batch in batches if any(ref.is_padding for ref in batch)]
    assert all(len(batch) == 1 for batch in padding)
    assert len(padding) == -len(whole) % ranks
    assert sorted(batch for batch in batches if batch not in padding) == sorted(whole)
    assert sum(not ref.is_padding for batch in batches for ref in batch) == samples


@pytest.mark.parametrize("size", [0, -1])
def test_evaluation_batches_of_less_than_one_sample_raise(size: int) -> None:
    dataset: Any = Refs(3)
    with pytest.raises(ValueError, match=f"batch_size.*{size}"):
        evaluation_batches(dataset, [DATASET_TASK], {"toy": [1] * 3}, size)


def test_an_absent_split_has_no_batches(tmp_path: Path) -> None:
    spec = DatasetSpec("toy", "mner", ("entity",), {"entity": TYPES}, {})
    dataset = ShardDataset(write_toy(tmp_path, spec, (("train", 2),)), tmp_path, "dev")
    lengths = text_lengths(dataset, [DATASET_TASK], 0, 1)
    assert lengths == {"toy": []}
    assert evaluation_batches(dataset, [DATASET_TASK], lengths, 4) == []
