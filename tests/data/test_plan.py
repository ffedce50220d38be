"""The plan of an epoch: every sample once, the same blocks however they are cut, resumable anywhere."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.data.plan import EpochPlan, MicroStep, Order, Place, UnitPass, micro_steps

Cut = tuple[int, int]
"""Ranks and micro-batch."""

units = st.dictionaries(
    st.sampled_from(["news/entity", "pairs/relation", "m2e2/trigger", "m2e2/argument"]),
    st.lists(st.integers(1, 13), min_size=1, max_size=5),
    min_size=1,
    max_size=3,
)
seeds = st.integers(0, 1 << 40)


@st.composite
def cuts(draw: st.DrawFn, count: int = 1) -> tuple[int, list[Cut]]:
    """A block, and ``count`` ways to cut it into micro-steps; a micro-step is the whole block or a part of it."""
    block = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    ways = [(ranks, size) for ranks in range(1, 5) for size in range(1, block + 1) if block % (ranks * size) == 0]
    return block, [draw(st.sampled_from(ways)) for _ in range(count)]


def steps_of(plan: EpochPlan, cut: Cut, done: int = 0) -> list[list[MicroStep]]:
    """The micro-steps of every rank."""
    ranks, micro_batch = cut
    return [list(micro_steps(plan, rank, ranks, micro_batch, done)) for rank in range(ranks)]


def joined(plan: EpochPlan, cut: Cut, done: int = 0) -> list[tuple[str, Place]]:
    """What all ranks together read, in the order of micro-steps and ranks."""
    return [
        (step.unit, place)
        for turn in zip(*steps_of(plan, cut, done), strict=True)
        for step in turn
        for place in step.places
    ]


@given(units, cuts(), seeds, st.integers(0, 3))
def test_every_sample_once_and_only_a_units_last_step_is_filled(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int, epoch: int
) -> None:
    block, [cut] = way
    plan = EpochPlan(sizes, Order(seed, block), epoch)
    read = joined(plan, cut)
    seen = Counter((unit, place.shard, place.sample) for unit, place in read if not place.wrapped)
    assert seen == Counter(
        {(unit, n, k): 1 for unit, counts in sizes.items() for n, size in enumerate(counts) for k in range(size)}
    )
    blocks = [read[start : start + block] for start in range(0, len(read), block)]
    for number, places in enumerate(blocks):
        (unit,) = {unit for unit, _ in places}
        last = all(unit != later[0][0] for later in blocks[number + 1 :])
        wrapped = sum(place.wrapped for _, place in places)
        assert wrapped == (-sum(sizes[unit]) % block if last else 0)
        for _, place in places:
            assert 0 <= place.sample < sizes[unit][place.shard]


@given(units, cuts(), seeds)
def test_ranks_read_the_same_unit_and_as_much(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int
) -> None:
    block, [cut] = way
    plan = EpochPlan(sizes, Order(seed, block), 0)
    by_rank = steps_of(plan, cut)
    assert {len(steps) for steps in by_rank} == {len(plan) * block // (cut[0] * cut[1])}
    for turn in zip(*by_rank, strict=True):
        assert len({step.unit for step in turn}) == 1
        assert {len(step.places) for step in turn} == {cut[1]}


@given(units, cuts(count=2), seeds)
def test_the_order_of_samples_does_not_depend_on_ranks_and_micro_batch(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int
) -> None:
    block, [one, other] = way
    assert joined(EpochPlan(sizes, Order(seed, block), 0), one) == joined(
        EpochPlan(sizes, Order(seed, block), 0), other
    )


@given(units, cuts(), seeds, st.data())
def test_resuming_twice_gives_the_rest(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int, data: st.DataObject
) -> None:
    block, [(ranks, micro_batch)] = way
    rank = data.draw(st.integers(0, ranks - 1))

    def some(start: int, count: int | None) -> list[MicroStep]:
        """What a fresh process reads, started after ``start`` micro-steps and killed after ``count``."""
        plan = EpochPlan(sizes, Order(seed, block), 1)
        return list(islice(micro_steps(plan, rank, ranks, micro_batch, start * ranks * micro_batch), count))

    whole = some(0, None)
    first = data.draw(st.integers(0, len(whole)))
    second = data.draw(st.integers(first, len(whole)))
    assert some(0, first) + some(first, second - first) + some(second, None) == whole


@given(units, cuts(count=3), seeds, st.data())
def test_resuming_anywhere_with_other_ranks_twice_gives_the_rest(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int, data: st.DataObject
) -> None:
    block, ways = way
    plan = EpochPlan(sizes, Order(seed, block), 0)
    whole = joined(plan, ways[0])
    read: list[tuple[str, Place]] = []
    done = 0
    for last, (ranks, size) in zip((False, False, True), ways, strict=True):
        wide = ranks * size
        turns = joined(plan, (ranks, size), done)
        stop = len(turns) if last else data.draw(st.integers(0, len(turns) // wide)) * wide
        before = done % wide
        if stop:
            assert [place.done for _, place in turns] == [number < before for number in range(len(turns))]
            done += stop - before
        read += [(unit, place) for unit, place in turns[:stop] if not place.done]
    assert read == whole


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), cuts(), seeds)
def test_all_ranks_together_touch_a_shard_about_once(sizes: list[int], way: tuple[int, list[Cut]], seed: int) -> None:
    block, [cut] = way
    by_rank = steps_of(EpochPlan({"unit": sizes}, Order(seed, block), 0), cut)
    touched = {
        (rank, place.shard)
        for rank, steps in enumerate(by_rank)
        for step in steps
        for place in step.places
        if not place.wrapped
    }
    # A rank's lanes are block / (ranks * micro_batch) runs of micro_batch neighbours. Runs and shards both cut one line
    # into pieces, so that there are at most runs + shards - 1 pairs of one that meets the other.
    runs = block // cut[1]
    assert len(touched) <= len(sizes) + runs - 1


@given(st.integers(1, 60), st.integers(1, 12), seeds)
def test_a_lane_is_one_run_of_the_permuted_shards(samples: int, block: int, seed: int) -> None:
    sizes = [samples // 3 + 1, samples, samples // 2 + 1]
    unit = UnitPass("unit", sizes, block, seed, 0)
    order: list[int] = []
    for lane in range(block):
        places = [unit.place(step, lane) for step in range(unit.steps)]
        read = [place for place in places if not place.wrapped]
        assert len(read) in (unit.samples // block, -(-unit.samples // block))
        order += [place.shard for place in read]
    assert sum(a != b for a, b in pairwise(order)) == len(sizes) - 1


@settings(max_examples=40)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.sampled_from([1, 2, 4]), seeds)
def test_units_are_interleaved_in_proportion(samples: list[int], block: int, seed: int) -> None:
    plan = EpochPlan({f"unit{n}": [size] for n, size in enumerate(samples)}, Order(seed, block), 0)
    total = len(plan)
    counts: Counter[str] = Counter()
    for number, (unit, step) in enumerate(map(plan.block, range(total)), start=1):
        assert step == counts[unit], "a unit's own steps are in order"
        counts[unit] += 1
        for name, steps in plan.steps.items():
            share = steps / total
            # At one moment of the epoch each count is less than 1 off; so is n, times the number of units.
            bound = (1 - share) + share * (len(samples) - 1)
            assert abs(counts[name] - number * share) < bound + 1e-9
    assert counts == plan.steps


def test_every_window_of_the_demo_holds_its_units_in_proportion() -> None:
    sizes = {"posts": [300], "news": [100], "pairs": [200], "trigger": [140], "argument": [140]}
    for seed in range(5):
        plan = EpochPlan(sizes, Order(seed, 8), 0)
        names = [plan.block(number)[0] for number in range(len(plan))]
        for start in range(len(names) - 15):
            window = Counter(names[start : start + 16])
            for unit, steps in plan.steps.items():
                assert abs(window[unit] - 16 * steps / len(names)) < 2


def test_epochs_seeds_and_units_have_orders_of_their_own() -> None:
    def order(unit: str = "a/entity", seed: int = 0, epoch: int = 0) -> list[Place]:
        return [place for _, place in joined(EpochPlan({unit: [20, 20, 20]}, Order(seed, 4), epoch), (1, 4))]

    orders = [order(), order(epoch=1), order(epoch=2), order(seed=1), order(seed=10), order(unit="b/entity")]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])
    assert order() == order()


def test_the_order_is_pinned() -> None:
    """Another order would break the resumption of runs that were started before: change it only on purpose."""
    plan = EpochPlan({"a/entity": [3, 4], "b/relation": [3]}, Order(7, 2), 1)
    read = [(unit[0], place.shard, place.sample, place.wrapped) for unit, place in joined(plan, (2, 1))]
    assert read == [
        ("a", 0, 0, False),
        ("a", 1, 2, False),
        ("b", 0, 0, False),
        ("b", 0, 1, False),
        ("a", 0, 1, False),
        ("a", 1, 0, False),
        ("a", 0, 2, False),
        ("a", 1, 3, False),
        ("b", 0, 0, True),
        ("b", 0, 2, False),
        ("a", 0, 0, True),
        ("a", 1, 1, False),
    ]


def test_a_block_that_cannot_be_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match="block of 6 samples cannot be cut into micro-steps of 2 x 2"):
        next(micro_steps(EpochPlan({"a/entity": [9]}, Order(0, 6), 0), 0, 2, 2))


@given(units, cuts(), seeds, st.sampled_from(["balanced", "temperature"]), st.floats(1, 8))
def test_other_interleaves_repeat_whole_passes(
    sizes: dict[str, list[int]], way: tuple[int, list[Cut]], seed: int, interleave: str, temperature: float
) -> None:
    """Every sample comes as often as any other of its unit, give or take one; the largest unit's once."""
    block, [cut] = way
    plan = EpochPlan(sizes, Order(seed, block, interleave, temperature), 0)
    seen = Counter((unit, place.shard, place.sample) for unit, place in joined(plan, cut) if not place.wrapped)
    largest = max(-(-sum(counts) // block) for counts in sizes.values())
    for unit, counts in sizes.items():
        times = [seen[unit, n, k] for n, size in enumerate(counts) for k in range(size)]
        assert min(times) >= 1
        assert max(times) - min(times) <= 1
        passes = -(-sum(counts) // block)
        if passes == largest:
            assert set(times) == {1}
        if interleave == "balanced":
            assert plan.steps[unit] == largest
    read = joined(plan, cut)
    assert {len(read)} == {sum(plan.steps.values()) * block}


def test_temperature_goes_from_proportional_to_balanced() -> None:
    sizes = {"a": [400], "b": [100], "c": [4]}

    def steps(interleave: str, temperature: float = 2.0) -> list[int]:
        return list(EpochPlan(sizes, Order(0, 4, interleave, temperature), 0).steps.values())

    assert steps("proportional") == steps("temperature", 1.0) == [100, 25, 1]
    assert steps("temperature", 2.0) == [100, 50, 10]
    assert steps("temperature", 1e9) == steps("balanced") == [100, 100, 100]


def test_every_pass_has_an_order_of_its_own() -> None:
    plan = EpochPlan({"large": [200], "small": [40]}, Order(0, 4, "balanced"), 0)
    small = [place.sample for unit, place in joined(plan, (1, 4)) if unit == "small"]
    passes = [small[start : start + 40] for start in range(0, 200, 40)]
    assert all(sorted(order) == list(range(40)) for order in passes)
    assert len({tuple(order) for order in passes}) == 5
