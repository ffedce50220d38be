"""Operations counted on the meta device, against formulas, a count of all blocks, and real steps on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lvlm_clorae import CLoRAEConfig
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import make_config
from tools.flops import PRODUCTS, Base, Cost, counting
from tools.methods import systems

pytestmark = pytest.mark.integration

TASKS = ["mner", "mre", "mee"]
CONFIG = make_config(
    {
        "per_device_train_batch_size": 2,
        "max_source_length": 24,
        "max_target_length": 8,
        "target_modules": ["q", "v", "wo"],
    }
)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(CONFIG)


def _count_whole(base: Base, config: TrainConfig) -> Cost:
    """Count all blocks one by one."""
    return base._count(copy.deepcopy(base._whole), config, TASKS)


@pytest.mark.parametrize("name", systems(CONFIG))
def test_extrapolation_from_short_stacks_equals_the_whole_count(base: Base, name: str) -> None:
    config = systems(CONFIG)[name]
    assert base.count(config, TASKS) == _count_whole(base, config)


@pytest.mark.slow
def test_stacks_of_different_lengths(base: Base) -> None:
    uneven = Base(CONFIG)
    del uneven._whole.decoder.block[1:]
    uneven._lengths = {**uneven._lengths, "decoder.block": 1}
    found = uneven.count(CONFIG, TASKS)
    assert found == _count_whole(uneven, CONFIG)
    assert found.both < base.count(CONFIG, TASKS).both


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["full", "LoRA", "LoRAMoE", "MTL-LoRA", "HydraLoRA", "C-LoRAE"])
def test_count_equals_that_of_a_real_step(name: str, dropout: float) -> None:
    config = replace(systems(CONFIG)[name], lora_dropout=dropout)
    model, _ = load_model(config.model)
    size, rows = model.vision_tower.image_size, config.per_device_train_batch_size
    batch: dict[str, Any] = {
        "input_ids": torch.randint(5, 100, (rows, config.max_source_length)),
        "attention_mask": torch.ones(rows, config.max_source_length, dtype=torch.long),
        "pixel_values": torch.randn(rows, 3, size, size),
        "pixel_mask": torch.ones(rows, dtype=torch.long),
        "labels": torch.randint(5, 100, (rows, config.max_target_length)),
    }
    model = add_adapter(model, config, TASKS).train()
    if name in ("LoRAMoE", "MTL-LoRA", "C-LoRAE"):
        model.set_task("mner")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
            loss = model(**batch).loss
            if name in ("LoRAMoE", "C-LoRAE"):
                loss = loss + model.base_model.aux_loss()
            forward = counter.get_total_flops()
            loss.backward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert Base(config).count(config, TASKS) == Cost(forward, counter.get_total_flops(), trained)


def layer_cost(config: peft.PeftConfig, tokens: int, d_in: int, d_out: int) -> tuple[int, int]:
    """(forward, forward and backward) of one adapted linear layer whose input has a gradient."""
    with torch.device("meta"):
        model: Any = peft.get_peft_model(nn.Sequential(nn.Linear(d_in, d_out, bias=False)), config).train()
        x = torch.empty(1, tokens, d_in, requires_grad=True)
    clorae = isinstance(config, CLoRAEConfig)
    if clorae:
        model.base_model.set_task(0)
    with counting() as counter:
        y = model(x)
        outputs = [y, model.base_model.aux_loss()] if clorae else [y]
        forward = counter.get_total_flops()
        edges = [torch.autograd.graph.get_gradient_edge(one) for one in outputs]
        torch.autograd.backward(edges, [torch.ones_like(one) for one in outputs])
    return forward, counter.get_total_flops()


sizes = st.integers(1, 40)


@settings(max_examples=10, deadline=None)
@given(sizes, sizes, sizes, sizes)
def test_formula_of_a_lora_layer(tokens: int, d_in: int, d_out: int, r: int) -> None:
    config = peft.LoraConfig(r=r, lora_dropout=0.1, target_modules=["0"])
    forward, both = layer_cost(config, tokens, d_in, d_out)
    frozen, narrow = 2 * tokens * d_in * d_out, 2 * tokens * r * (d_in + d_out)
    assert forward == frozen + narrow
    assert both == 2 * frozen + 3 * narrow


@settings(max_examples=10, deadline=None)
@given(sizes, sizes, sizes, st.integers(3, 40))
def test_formula_of_a_clorae_layer(tokens: int, d_in: int, d_out: int, r: int) -> None:
    config = CLoRAEConfig(r=r, tasks=TASKS, lora_dropout=0.1, target_modules=["0"])
    forward, both = layer_cost(config, tokens, d_in, d_out)
    width = r + max(1, round(r / 3))
    filled = width + -width % 8  # where it is not summed over
    student, frozen = width - r, 2 * tokens * d_in * d_out
    narrow, gate = 2 * tokens * (filled * d_in + width * d_out), 4 * tokens * d_in
    narrow_backward = 2 * tokens * (filled * (d_in + 2 * d_out) + width * d_in)
    moment, term = 2 * tokens * width * width, 2 * d_out * (r * r + width * student)
    assert forward == frozen + narrow + gate + moment + term
    # The backward recomputes the term and differentiates its products of two factors with a gradient once each
    term_backward = 2 * d_out * student * (r + 2 * student)
    backward = frozen + narrow_backward + 2 * gate + 2 * tokens * width * student + term + term_backward
    assert both == forward + backward


@pytest.mark.parametrize(("model", "rank", "bar"), [("flan-t5-base", 128, 1.03), ("flan-t5-large", 64, 1.015)])
def test_cost_of_clorae_relative_to_lora(model: str, rank: int, bar: float) -> None:
    config: TrainConfig = make_config({"model": model, "lora_rank": rank})
    base, named = Base(config), systems(config)
    lora, clorae = (base.count(named[name], TASKS) for name in ("LoRA", "C-LoRAE"))
    assert 1 < clorae.forward / lora.forward <= bar
    assert 1 < clorae.both / lora.both <= bar
