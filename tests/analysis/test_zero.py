"""ZeRO's memory and communication, by hand for a small model (two ranks: tests/distributed/test_scaling.py)."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.analysis.cost import describe
from lvlm_clorae.analysis.zero import (
    Collective,
    Setting,
    Weight,
    Zero,
    list_weights,
    memory,
    order_of_uses,
    sent,
    traffic,
)
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.launch import REPOSITORY
from tests.helpers.weights import B, models, small_model

TASKS = ["mner", "mre", "mee"]
FROZEN, TRAINED = 4300, 30
BARE = Zero(3, stage3_prefetch_bucket_size=0, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0)


def weights_of(model: str, itemsize: int, bits: int = 16) -> list[Weight]:
    return list_weights(describe(make_config({"model": model}), TASKS), itemsize, bits)


def payloads(weights: list[Weight], setting: Setting) -> dict[str, tuple[str, int]]:
    return {one.purpose: (one.kind, one.payload) for one in traffic(weights, setting)}


def test_stacks_of_the_demo_base() -> None:
    found = weights_of("demo", 4)
    stacks = {weight.stack for weight in found}
    assert stacks == {"tower", "projector", "embedding", "encoder", "decoder", "unused"}
    for weight in found:
        assert not (weight.trained and weight.stack in ("tower", "embedding", "unused"))
        assert weight.bytes == 4 * weight.numel
    assert {weight.block for weight in found if weight.stack == "tower"} == {""}
    blocks = {weight.block for weight in found if weight.stack == "encoder"}
    assert "base_model.model.encoder.block.3" in blocks


def test_bytes_of_quantised_weights_equal_the_measurement() -> None:
    """benchmarks/quantised_base.py sums what bitsandbytes stores for a base of this shape."""
    path = REPOSITORY / "benchmarks/results/quantised_base-cpu-2026-11-24.json"
    measured = json.loads(path.read_text(encoding="utf-8"))["variants"]
    variants = {"fp32": (4, 16), "int8": (2, 8), "nf4": (2, 4), "int8, fp32": (4, 8), "nf4, fp32": (4, 4)}
    model = describe(make_config({"model": "flan-t5-base"}), TASKS)
    for name, (itemsize, bits) in variants.items():
        frozen = [weight for weight in list_weights(model, itemsize, bits) if not weight.trained]
        stored = sum(weight.bytes for weight in frozen if weight.stack in ("encoder", "decoder", "embedding"))
        assert stored == measured[name]["bytes"]["language model"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_order_of_uses(checkpointing: bool) -> None:
    weights = small_model(2)
    names = [weights[use.weight].name.rsplit(".", 1)[0] for use in order_of_uses(weights, checkpointing)]
    first, second = (f"model.layers.{number}" for number in range(2))
    forward = ["embed", "vision_tower.x", f"{first}.q", f"{first}.a", f"{second}.q", f"{second}.a", "lm_head"]
    again = [f"{second}.q", f"{second}.a"] if checkpointing else []
    # weights before the first adapter pass on no gradient
    back = ["lm_head", *again, f"{second}.a", f"{second}.q"]
    back += [f"{first}.a"] * (2 if checkpointing else 1)
    assert names == forward + back


def test_a_tied_embedding_is_used_as_embedding_and_as_head() -> None:
    weights = [weight for weight in small_model(1) if weight.name != "lm_head.weight"]
    names = [weights[use.weight].name for use in order_of_uses(weights, False)]
    assert [place for place, name in enumerate(names) if name == "embed.weight"] == [0, 4, 5]


def test_defaults_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig(stage=2).model_dump()
    for item in fields(Zero):
        name = item.name.removeprefix("stage3_")
        if item.name not in ("stage", "offload_optimizer", "offload_param"):
            assert getattr(Zero.read({"stage": 2}), item.name) == theirs[name], name
    assert Zero.read({"stage": 3}).overlap_comm is DeepSpeedZeroConfig(stage=3).overlap_comm is True


def test_a_deepspeed_file_is_read() -> None:
    content: dict[str, Any] = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text(encoding="utf-8"))
    zero = Zero.read({**content["zero_optimization"], "offload_param": {"device": "cpu"}})
    assert (zero.stage, zero.reduce_bucket_size, zero.overlap_comm) == (3, 50_000_000, True)
    assert zero.stage3_param_persistence_threshold == 100_000
    assert (zero.offload_param, zero.offload_optimizer) == (True, False)
    assert Zero.read({"stage": 1, "offload_optimizer": {"device": "none"}}) == Zero(1)


@pytest.mark.parametrize("stage", [1, 2])
def test_traffic_of_whole_weights(stage: int) -> None:
    found = payloads(small_model(), Setting(2, Zero(stage), accumulation=4, aux_terms=3))
    reductions = 4 if stage == 2 else 1  # ZeRO-2 reduces in every micro-step
    assert found["gradients"] == ("all_reduce", B * TRAINED * reductions)
    assert found["losses"] == ("all_reduce", 4 * 4 * (1 + 3 + 5))
    assert found["updated weights"] == ("all_gather", B * 32)  # padded to 2 n


def test_gradients_can_be_reduced_to_their_owners() -> None:
    zero = Zero(2, use_multi_rank_bucket_allreduce=False)
    assert payloads(small_model(), Setting(2, zero))["gradients"] == ("reduce", B * TRAINED)


def test_traffic_of_partitioned_weights() -> None:
    """All in forward; in backward all but embedding, tower and the first frozen matrix. Each is padded to n."""
    found = payloads(small_model(), Setting(4, BARE))
    forward, backward = 500 + 300 + 3 * (1000 + 12) + 500, 500 + 2 * 1000 + 3 * 12
    assert found["weights"] == ("all_gather", B * (forward + backward))
    assert found["gradients"] == ("reduce_scatter", B * 3 * 12)
    assert "updated weights" not in found
    again = payloads(small_model(), Setting(4, BARE, checkpointing=True))["weights"][1]
    assert again == B * (forward + backward + 2 * 1000 + 3 * 12)
    kept = replace(BARE, stage3_max_reuse_distance=3000)
    # The head and the last block stay: fewer than 3000 elements are used in between. The block before it has 3020.
    assert payloads(small_model(), Setting(4, kept))["weights"][1] == B * (forward + backward - 500 - 1012)


def test_the_prefetcher_keeps_what_it_meets() -> None:
    forward, backward = 500 + 300 + 3 * (1000 + 12) + 500, 500 + 2 * 1000 + 3 * 12

    def gathered(live: int, checkpointing: bool) -> int:
        zero = replace(BARE, stage3_prefetch_bucket_size=10, stage3_max_live_parameters=live)
        return payloads(small_model(), Setting(4, zero, checkpointing=checkpointing))["weights"][1]

    assert gathered(400, False) == B * (forward + backward)
    # the head and the last adapter, 510 elements before the turn, stay
    assert gathered(1300, False) == B * (forward + backward - 500 - 12)
    # of the forward 1520 elements stay, so that the second block's matrix and the first block's adapter do not
    assert gathered(1600, True) == B * (forward + 1000 + 12)


def test_weights_below_the_threshold_are_gathered_after_the_step_only() -> None:
    zero = replace(BARE, stage3_param_persistence_threshold=10**9)
    found = payloads(small_model(), Setting(4, zero, accumulation=5))
    assert "weights" not in found
    assert found["updated weights"] == ("all_gather", B * (500 + 3 * (1000 + 12) + 500 + 300))


def test_bytes_on_a_ring() -> None:
    assert Collective("", "all_reduce", 1, 800).sent(4) == 1200
    assert Collective("", "all_gather", 1, 800).sent(4) == Collective("", "reduce_scatter", 1, 800).sent(4) == 600


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 3), st.integers(2, 64), st.integers(1, 4))
def test_traffic_grows_with_micro_steps_and_with_what_is_not_kept(
    weights: list[Weight], stage: int, ranks: int, accumulation: int
) -> None:
    setting = Setting(ranks, Zero(stage, overlap_comm=True), accumulation)
    found = traffic(weights, setting)
    assert all(one.calls > 0 for one in found)
    assert traffic(weights, replace(setting, ranks=1)) == []
    assert sent(found, ranks) <= 2 * sum(one.payload for one in found)
    more = traffic(weights, replace(setting, accumulation=accumulation + 1))
    assert sent(more, ranks) > sent(found, ranks)
    if stage == 3:
        bare = traffic(weights, replace(setting, zero=BARE))
        least = Zero(3, stage3_param_persistence_threshold=0)
        assert sent(bare, ranks) >= sent(traffic(weights, replace(setting, zero=least)), ranks)


def test_memory_of_each_stage() -> None:
    zero = Zero(reduce_bucket_size=100, stage3_param_persistence_threshold=0)
    found = [memory(small_model(), Setting(2, replace(zero, stage=stage)))[0] for stage in (1, 2, 3)]
    assert found[0] == {
        "frozen weights": B * FROZEN,
        "trained weights": B * 32,  # padded to 2 n
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
        assert memory(small_model(), Setting(2, zero))[0]["buckets"] == times * B * 100


def test_gathered_weights_are_bounded() -> None:
    zero = Zero(3, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0, stage3_max_live_parameters=2000)
    setting = Setting(2, zero)
    assert memory(small_model(), setting)[0]["weights gathered"] == B * 2000
    bare = replace(zero, stage3_prefetch_bucket_size=0)
    assert memory(small_model(), replace(setting, zero=bare))[0]["weights gathered"] == B * 1000
    again = replace(setting, zero=bare, checkpointing=True)
    assert memory(small_model(), again)[0]["weights gathered"] == B * 1010


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 3), st.sampled_from([1, 2, 8, 64]), st.booleans(), st.booleans())
def test_offload_moves_memory_and_more_ranks_need_no_more(
    weights: list[Weight], stage: int, ranks: int, optimizer: bool, parameters: bool
) -> None:
    setting = Setting(ranks, Zero(stage))
    whole, host = memory(weights, setting)
    assert not host
    offload = Zero(stage, offload_optimizer=optimizer, offload_param=parameters)
    kept, moved = memory(weights, replace(setting, zero=offload))
    assert {**kept, **moved} == whole
    more, _ = memory(weights, replace(setting, ranks=2 * ranks))
    for name in ("frozen weights", "moments", "gradients"):
        # padding may cost an element of each weight
        assert more.get(name, 0) <= whole.get(name, 0) + 8 * (2 * ranks + len(weights))
