"""ZeRO's memory, by hand for a small model (two ranks: tests/distributed/test_scaling.py)."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.analysis.cost import describe
from lvlm_clorae.analysis.zero import SHIPPED, Setting, Weight, Zero, list_weights, memory
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.launch import REPOSITORY
from tests.helpers.weights import B, models, small_model

TASKS = ["mner", "mre", "mee"]
FROZEN, TRAINED = 4300, 30


def weights_of(model: str, itemsize: int, bits: int = 16) -> list[Weight]:
    return list_weights(describe(make_config({"model": model}), TASKS), itemsize, bits)


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


def test_shipped_settings_are_those_of_the_files() -> None:
    for stage in (2, 3):
        content = json.loads((REPOSITORY / f"ds_configs/zero{stage}.json").read_text(encoding="utf-8"))
        assert Zero.read(content["zero_optimization"]) == Zero.read({"stage": stage, **SHIPPED})


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
