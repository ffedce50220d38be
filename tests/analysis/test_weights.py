"""The weights of a described model: which is which, what quantised ones weigh, in which order a step uses them."""

from __future__ import annotations

import json

import pytest

from lvlm_clorae.analysis.parameters import describe
from lvlm_clorae.analysis.weights import Weight, list_weights, order_of_uses
from lvlm_clorae.training.config import make_config
from tests.analysis.sizes import small_model
from tests.launch import REPOSITORY

TASKS = ["mner", "mre", "mee"]


def of(model: str, itemsize: int, bits: int = 16) -> list[Weight]:
    return list_weights(describe(make_config({"model": model}), TASKS), itemsize, bits)


def test_stacks_of_the_demo_base() -> None:
    found = of("demo", 4)
    stacks = {weight.stack for weight in found}
    assert stacks == {"tower", "projector", "embedding", "encoder", "decoder", "unused"}
    for weight in found:
        assert not (weight.trained and weight.stack in ("tower", "embedding", "unused"))
        assert weight.bytes == 4 * weight.numel
    assert {weight.block for weight in found if weight.stack == "tower"} == {""}
    blocks = {weight.block for weight in found if weight.stack == "encoder"}
    assert "base_model.model.encoder.block.3" in blocks


def test_quantised_weights_weigh_what_was_measured() -> None:
    """benchmarks/quantised_base.py adds up what bitsandbytes really stores of a base of this shape."""
    path = REPOSITORY / "benchmarks/results/quantised_base-cpu-2026-11-24.json"
    measured = json.loads(path.read_text(encoding="utf-8"))["variants"]
    variants = {"fp32": (4, 16), "int8": (2, 8), "nf4": (2, 4), "int8, fp32": (4, 8), "nf4, fp32": (4, 4)}
    model = describe(make_config({"model": "flan-t5-base"}), TASKS)
    for name, (itemsize, bits) in variants.items():
        weights = list_weights(model, itemsize, bits)
        stored = sum(
            weight.bytes for weight in weights if weight.stack in ("encoder", "decoder", "embedding")
            and not weight.trained
        )  # fmt: skip
        assert stored == measured[name]["bytes"]["language model"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_order_of_uses(checkpointing: bool) -> None:
    weights = small_model(2)
    names = [weights[use.weight].name.rsplit(".", 1)[0] for use in order_of_uses(weights, checkpointing)]
    first, second = (f"model.layers.{number}" for number in range(2))
    forward = ["embed", "vision_tower.x", f"{first}.q", f"{first}.a", f"{second}.q", f"{second}.a", "lm_head"]
    again = [f"{second}.q", f"{second}.a"] if checkpointing else []
    # Nothing before the first adapter has a gradient to pass on.
    back = ["lm_head", *again, f"{second}.a", f"{second}.q"]
    back += [f"{first}.a"] * (2 if checkpointing else 1)
    assert names == forward + back


def test_an_embedding_that_is_the_head_too_is_used_by_each() -> None:
    weights = [weight for weight in small_model(1) if weight.name != "lm_head.weight"]
    names = [weights[use.weight].name for use in order_of_uses(weights, False)]
    assert [place for place, name in enumerate(names) if name == "embed.weight"] == [0, 4, 5]
