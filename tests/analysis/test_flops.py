"""Operations counted on the meta device: by formula, by a count of all blocks, by real steps on the CPU."""

from __future__ import annotations

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
from lvlm_clorae.analysis.comparison import systems
from lvlm_clorae.analysis.flops import PRODUCTS, Base, Cost, counting
from lvlm_clorae.models.loading import load_model
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig, make_config

TASKS = ["mner", "mre", "mee"]
CONFIG = make_config({"micro_batch": 2, "max_length": 24, "max_answer_length": 8, "target_modules": ["q", "v", "wo"]})


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(CONFIG)


@pytest.mark.parametrize("name", systems(CONFIG))
def test_short_stacks_tell_the_whole(base: Base, name: str) -> None:
    config = systems(CONFIG)[name]
    assert base.count(config, TASKS) == base.count_whole(config, TASKS)


def test_stacks_of_different_lengths(base: Base) -> None:
    uneven = Base(CONFIG)
    del uneven._whole.decoder.block[1:]
    uneven._lengths = {**uneven._lengths, "decoder.block": 1}
    found = uneven.count(CONFIG, TASKS)
    assert found == uneven.count_whole(CONFIG, TASKS)
    assert found.both < base.count(CONFIG, TASKS).both


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["full", "LoRA", "LoRAMoE", "C-LoRAE"])
def test_as_many_as_real_steps_take(name: str, dropout: float) -> None:
    config = replace(systems(CONFIG)[name], dropout=dropout)
    model, _ = load_model(config.model)
    size, rows = model.vision_tower.image_size, config.micro_batch
    batch: dict[str, Any] = {
        "input_ids": torch.randint(5, 100, (rows, config.max_length)),
        "attention_mask": torch.ones(rows, config.max_length, dtype=torch.long),
        "pixel_values": torch.randn(rows, 3, size, size),
        "pixel_mask": torch.ones(rows, dtype=torch.long),
        "labels": torch.randint(5, 100, (rows, config.max_answer_length)),
    }
    model = add_adapter(model, config, TASKS).train()
    if name in ("LoRAMoE", "C-LoRAE"):
        model.set_task("mner")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
            loss = model(**batch).loss
            if name == "C-LoRAE":
                loss = loss + model.mutual_information_loss()
            elif name == "LoRAMoE":
                loss = loss + model.balance_loss()
            forward = counter.get_total_flops()
            loss.backward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert Base(config).count(config, TASKS) == Cost(forward, counter.get_total_flops(), trained)


def test_a_term_of_drawn_tokens_costs_less_and_always_as_much(base: Base) -> None:
    config = replace(CONFIG, mim_tokens=5)
    costs = {base.count(config, TASKS) for _ in range(5)}
    [drawn] = costs
    every, none = base.count(CONFIG, TASKS), base.count(replace(CONFIG, beta=0.0), TASKS)
    assert none.forward < drawn.forward < every.forward
    assert none.both < drawn.both < every.both
    assert drawn == base.count_whole(config, TASKS)


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
        outputs = [y, model.base_model.mutual_information_loss()] if clorae else [y]
        forward = counter.get_total_flops()
        edges = [torch.autograd.graph.get_gradient_edge(one) for one in outputs]
        torch.autograd.backward(edges, [torch.ones_like(one) for one in outputs])
    return forward, counter.get_total_flops()


sizes = st.integers(1, 40)


@settings(max_examples=10, deadline=None)
@given(sizes, sizes, sizes, sizes)
def test_a_layer_of_lora(tokens: int, d_in: int, d_out: int, r: int) -> None:
    config = peft.LoraConfig(r=r, lora_dropout=0.1, target_modules=["0"])
    forward, both = layer_cost(config, tokens, d_in, d_out)
    frozen, narrow = 2 * tokens * d_in * d_out, 2 * tokens * r * (d_in + d_out)
    assert forward == frozen + narrow
    assert both == 2 * frozen + 3 * narrow


@settings(max_examples=10, deadline=None)
@given(sizes, sizes, sizes, st.integers(3, 40))
def test_a_layer_of_clorae(tokens: int, d_in: int, d_out: int, r: int) -> None:
    config = CLoRAEConfig(r=r, tasks=TASKS, lora_dropout=0.1, target_modules=["0"])
    forward, both = layer_cost(config, tokens, d_in, d_out)
    width = r + max(1, round(r / 3))
    student, frozen = width - r, 2 * tokens * d_in * d_out
    narrow, gate = 2 * tokens * width * (d_in + d_out), 2 * tokens * d_in
    moment = r * r + width * student  # the blocks of S
    assert forward == frozen + narrow + gate + 2 * (tokens + d_out) * moment
    assert both == frozen + forward + 2 * narrow + 2 * gate + 2 * (tokens + 2 * d_out) * width * student


@settings(max_examples=10, deadline=None)
@given(st.integers(6, 40), sizes, sizes, st.integers(3, 40), st.integers(1, 5))
def test_a_layer_of_clorae_with_drawn_tokens(tokens: int, d_in: int, d_out: int, r: int, drawn: int) -> None:
    config = CLoRAEConfig(r=r, tasks=TASKS, lora_dropout=0.1, target_modules=["0"], mim_tokens=drawn)
    forward, both = layer_cost(config, tokens, d_in, d_out)
    width = r + max(1, round(r / 3))
    student, frozen = width - r, 2 * tokens * d_in * d_out
    narrow, gate = 2 * tokens * width * (d_in + d_out), 2 * tokens * d_in
    assert forward == frozen + narrow + gate + 2 * drawn * d_out * width
    assert both == frozen + forward + 2 * narrow + 2 * gate + 4 * drawn * d_out * student


@pytest.mark.parametrize(("model", "rank", "bar"), [("flan-t5-base", 128, 1.02), ("flan-t5-large", 64, 1.01)])
def test_what_clorae_costs_beside_lora(model: str, rank: int, bar: float) -> None:
    config: TrainConfig = make_config({"model": model, "rank": rank})
    base, named = Base(config), systems(config)
    lora, clorae = (base.count(named[name], TASKS) for name in ("LoRA", "C-LoRAE"))
    assert 1 < clorae.forward / lora.forward <= bar
    assert 1 < clorae.both / lora.both <= bar
