"""What a rank keeps, by hand for a small model; two real ranks count it in tests/distributed/test_scaling.py."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.analysis.memory import KINDS, memory
from lvlm_clorae.analysis.traffic import Setting, Zero
from lvlm_clorae.analysis.weights import Weight
from tests.analysis.sizes import B, models, small_model

FROZEN, TRAINED = 4300, 30


def test_each_stage_partitions_more() -> None:
    zero = Zero(reduce_bucket_size=100, stage3_param_persistence_threshold=0)
    found = [memory(small_model(), Setting(2, replace(zero, stage=stage))).gpu for stage in (1, 2, 3)]
    assert found[0] == {
        "frozen weights": B * FROZEN,
        "trained weights": B * 32,  # filled up to 2 n
        "gradients": B * TRAINED,
        "buckets": B * 100,
        "fp32 gradients": 4 * 16,
        "master weights": 4 * 16,
        "moments": 8 * 16,
    }
    assert found[1] == {**found[0], "gradients": B * 16}
    assert found[2]["frozen weights"] == B * FROZEN // 2
    assert found[2]["weights gathered"] == B * (FROZEN + TRAINED)
    assert found[2]["buckets"] == B * 100


def test_overlap_doubles_the_buckets_of_zero_2() -> None:
    for stage, times in ((2, 2), (3, 1)):
        zero = Zero(stage, reduce_bucket_size=100, overlap_comm=True)
        assert memory(small_model(), Setting(2, zero)).gpu["buckets"] == times * B * 100


def test_the_gathered_part_is_bounded() -> None:
    zero = Zero(3, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0, stage3_max_live_parameters=2000)
    setting = Setting(2, zero)
    assert memory(small_model(), setting).gpu["weights gathered"] == B * 2000
    bare = replace(zero, stage3_prefetch_bucket_size=0)
    assert memory(small_model(), replace(setting, zero=bare)).gpu["weights gathered"] == B * 1000
    again = replace(setting, zero=bare, checkpointing=True)
    assert memory(small_model(), again).gpu["weights gathered"] == B * 1010


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 3), st.sampled_from([1, 2, 8, 64]), st.booleans(), st.booleans())
def test_guarantees(weights: list[Weight], stage: int, ranks: int, optimizer: bool, parameters: bool) -> None:
    setting = Setting(ranks, Zero(stage))
    whole = memory(weights, setting)
    assert not whole.host
    assert set(whole.gpu) <= set(KINDS)
    away = memory(weights, replace(setting, zero=Zero(stage, offload_optimizer=optimizer, offload_param=parameters)))
    assert sum(away.total()) == sum(whole.total())  # moved, none lost
    more = memory(weights, replace(setting, ranks=2 * ranks))
    for kind in ("frozen weights", "moments", "gradients"):
        # Filling up may cost a weight's elements each.
        assert more.gpu.get(kind, 0) <= whole.gpu.get(kind, 0) + 8 * (2 * ranks + len(weights))
