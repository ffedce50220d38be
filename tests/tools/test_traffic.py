"""ZeRO's communication, by hand for a small model (two ranks: tests/distributed/test_scaling.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.analysis.zero import Weight, Zero
from tests.helpers.weights import B, models, small_model
from tools.traffic import Collective, Step, order_of_uses, sent, traffic

TRAINED = 30
BARE = Zero(3, stage3_prefetch_bucket_size=0, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0)


def payloads(weights: list[Weight], step: Step) -> dict[str, tuple[str, int]]:
    return {one.purpose: (one.kind, one.payload) for one in traffic(weights, step)}


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


@pytest.mark.parametrize("stage", [1, 2])
def test_traffic_of_whole_weights(stage: int) -> None:
    found = payloads(small_model(), Step(2, Zero(stage), accumulation=4, aux_terms=3))
    reductions = 4 if stage == 2 else 1  # ZeRO-2 reduces in every micro-step
    assert found["gradients"] == ("all_reduce", B * TRAINED * reductions)
    assert found["losses"] == ("all_reduce", 4 * 4 * (1 + 3 + 5))
    assert found["updated weights"] == ("all_gather", B * 32)  # padded to 2 n


def test_gradients_can_be_reduced_to_their_owners() -> None:
    zero = Zero(2, use_multi_rank_bucket_allreduce=False)
    assert payloads(small_model(), Step(2, zero))["gradients"] == ("reduce", B * TRAINED)


def test_traffic_of_partitioned_weights() -> None:
    """All in forward; in backward all but embedding, tower and the first frozen matrix. Each is padded to n."""
    found = payloads(small_model(), Step(4, BARE))
    forward, backward = 500 + 300 + 3 * (1000 + 12) + 500, 500 + 2 * 1000 + 3 * 12
    assert found["weights"] == ("all_gather", B * (forward + backward))
    assert found["gradients"] == ("reduce_scatter", B * 3 * 12)
    assert "updated weights" not in found
    again = payloads(small_model(), Step(4, BARE, checkpointing=True))["weights"][1]
    assert again == B * (forward + backward + 2 * 1000 + 3 * 12)
    kept = replace(BARE, stage3_max_reuse_distance=3000)
    # The head and the last block stay: fewer than 3000 elements are used in between. The block before it has 3020.
    assert payloads(small_model(), Step(4, kept))["weights"][1] == B * (forward + backward - 500 - 1012)


def test_the_prefetcher_keeps_what_it_meets() -> None:
    forward, backward = 500 + 300 + 3 * (1000 + 12) + 500, 500 + 2 * 1000 + 3 * 12

    def gathered(live: int, checkpointing: bool) -> int:
        zero = replace(BARE, stage3_prefetch_bucket_size=10, stage3_max_live_parameters=live)
        return payloads(small_model(), Step(4, zero, checkpointing=checkpointing))["weights"][1]

    assert gathered(400, False) == B * (forward + backward)
    # the head and the last adapter, 510 elements before the turn, stay
    assert gathered(1300, False) == B * (forward + backward - 500 - 12)
    # of the forward 1520 elements stay, so that the second block's matrix and the first block's adapter do not
    assert gathered(1600, True) == B * (forward + 1000 + 12)


def test_weights_below_the_threshold_are_gathered_after_the_step_only() -> None:
    zero = replace(BARE, stage3_param_persistence_threshold=10**9)
    found = payloads(small_model(), Step(4, zero, accumulation=5))
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
    step = Step(ranks, Zero(stage, overlap_comm=True), accumulation=accumulation)
    found = traffic(weights, step)
    assert all(one.calls > 0 for one in found)
    assert traffic(weights, replace(step, ranks=1)) == []
    assert sent(found, ranks) <= 2 * sum(one.payload for one in found)
    more = traffic(weights, replace(step, accumulation=accumulation + 1))
    assert sent(more, ranks) > sent(found, ranks)
    if stage == 3:
        bare = traffic(weights, replace(step, zero=BARE))
        least = Zero(3, stage3_param_persistence_threshold=0)
        assert sent(bare, ranks) >= sent(traffic(weights, replace(step, zero=least)), ranks)
