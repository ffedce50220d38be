"""What ranks send, by hand for a small model; two real ranks count it in tests/distributed/test_scaling.py."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.analysis.traffic import Collective, Setting, Zero, sent, traffic
from lvlm_clorae.analysis.weights import Weight
from tests.analysis.sizes import B, models, small_model
from tests.launch import REPOSITORY

BARE = Zero(3, stage3_prefetch_bucket_size=0, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0)


def payloads(weights: list[Weight], setting: Setting) -> dict[str, tuple[str, int]]:
    return {one.purpose: (one.kind, one.payload) for one in traffic(weights, setting)}


def test_defaults_are_deepspeeds() -> None:
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
def test_whole_weights(stage: int) -> None:
    trained = 30
    found = payloads(small_model(), Setting(2, Zero(stage), accumulation=4, side_terms=3))
    reductions = 4 if stage == 2 else 1  # ZeRO-2 reduces in every micro-step
    assert found["gradients"] == ("all_reduce", B * trained * reductions)
    assert found["losses"] == ("all_reduce", 4 * 4 * (1 + 3 + 5))
    assert found["updated weights"] == ("all_gather", B * 32)  # filled up to 2 n


def test_gradients_to_their_owners() -> None:
    zero = Zero(2, use_multi_rank_bucket_allreduce=False)
    assert payloads(small_model(), Setting(2, zero))["gradients"] == ("reduce", B * 30)


def test_partitioned_weights() -> None:
    """Forward all, backward all but embedding, tower and the first frozen matrix; each filled up to a multiple of n."""
    found = payloads(small_model(), Setting(4, BARE))
    forward, backward = 500 + 300 + 3 * (1000 + 12) + 500, 500 + 2 * 1000 + 3 * 12
    assert found["weights"] == ("all_gather", B * (forward + backward))
    assert found["gradients"] == ("reduce_scatter", B * 3 * 12)
    assert "updated weights" not in found
    again = payloads(small_model(), Setting(4, BARE, checkpointing=True))["weights"][1]
    assert again == B * (forward + backward + 2 * 1000 + 3 * 12)
    kept = replace(BARE, stage3_max_reuse_distance=3000)
    # The head and the last block stay: less than 3000 elements are used in between. Of the block before it are 3020.
    assert payloads(small_model(), Setting(4, kept))["weights"][1] == B * (forward + backward - 500 - 1012)


def test_what_persists_is_gathered_after_the_step_only() -> None:
    zero = replace(BARE, stage3_param_persistence_threshold=10**9)
    found = payloads(small_model(), Setting(4, zero, accumulation=5))
    assert "weights" not in found
    assert found["updated weights"] == ("all_gather", B * (500 + 3 * (1000 + 12) + 500 + 300))


def test_a_ring() -> None:
    assert Collective("", "all_reduce", 1, 800).sent(4) == 1200
    assert Collective("", "all_gather", 1, 800).sent(4) == Collective("", "reduce_scatter", 1, 800).sent(4) == 600


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 3), st.integers(2, 64), st.integers(1, 4))
def test_guarantees(weights: list[Weight], stage: int, ranks: int, accumulation: int) -> None:
    setting = Setting(ranks, Zero(stage, overlap_comm=True), accumulation)
    found = traffic(weights, setting)
    assert all(one.calls > 0 for one in found)
    assert traffic(weights, replace(setting, ranks=1)) == []
    assert sent(found, ranks) <= 2 * sum(one.payload for one in found)
    more = traffic(weights, replace(setting, accumulation=accumulation + 1))
    assert sent(more, ranks) > sent(found, ranks)
    if stage == 3:  # the less is kept, the more is sent
        bare = traffic(weights, replace(setting, zero=BARE))
        least = Zero(3, stage3_param_persistence_threshold=0)
        assert sent(bare, ranks) >= sent(traffic(weights, replace(setting, zero=least)), ranks)
