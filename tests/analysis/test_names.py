"""Names of runs in tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.analysis.names import UNDECIDING, deciding, format_value, names
from lvlm_clorae.training.config import FIELDS
from lvlm_clorae.training.config_loading import make_config
from lvlm_clorae.training.run_directory import MAY_CHANGE
from tests.helpers.sweeps import SETTINGS


def named(*given: dict[str, Any]) -> list[str]:
    return names([make_config(config) for config in given])


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ({}, "C-LoRAE"),
        ({"use_experts": False}, "C-LoRAE, only universal"),
        ({"use_universal": False}, "C-LoRAE, only task experts"),
        ({"use_gate": False}, "C-LoRAE, no gate"),
        ({"beta": 0}, "C-LoRAE, no MIM"),
        ({"loss_weighting": "none"}, "C-LoRAE, no achievement loss"),
        ({"use_gate": False, "beta": 0}, "C-LoRAE, no gate, no MIM"),
        ({"adapter": "lora", "use_gate": False, "beta": 0}, "LoRA"),
        ({"adapter": "moslora"}, "MoSLoRA"),
        ({"adapter": "loramoe"}, "LoRAMoE"),
        ({"adapter": "mtllora"}, "MTL-LoRA"),
        ({"adapter": "hydralora"}, "HydraLoRA"),
        ({"adapter": "full"}, "full fine-tuning"),
        ({"adapter": "full", "fusion": "gated", "loss_weighting": "none"}, "UMIE"),
        ({"adapter": "none"}, "base alone"),
    ],
)
def test_a_single_run_is_named_by_its_system_and_ablations(run: dict[str, Any], name: str) -> None:
    assert named(run) == [name]
    assert named({"lora_rank": 3, "seed": 7, "shards": "x", **run}) == [name], "there is no other run to differ from"


def test_only_differing_settings_are_named() -> None:
    common = {"model": "owner/name", "shards": "shards/real", "hold_out": ["m2e2"]}
    assert named(common, {**common, "lora_rank": 32}, {**common, "lora_rank": 32, "beta": 0}) == [
        "C-LoRAE",
        "C-LoRAE, lora_rank=32",
        "C-LoRAE, no MIM, lora_rank=32",
    ]
    assert named({**common, "hold_out": []}, common) == ["C-LoRAE", "C-LoRAE, hold_out=m2e2"]


def test_settings_of_the_bases_recipe_are_not_named() -> None:
    base, large = ({"model": f"flan-t5-{size}"} for size in ("base", "large"))
    assert make_config(base).lora_rank != make_config(large).lora_rank
    assert named(base, large, {**large, "lora_rank": 128}) == [
        "C-LoRAE flan-t5-base",
        "C-LoRAE flan-t5-large",
        "C-LoRAE flan-t5-large, lora_rank=128",
    ]


def test_the_achievement_loss_is_named_where_it_is_unusual() -> None:
    with_it, without = {"adapter": "lora"}, {"adapter": "lora", "loss_weighting": "none"}
    assert named({}, with_it) == ["C-LoRAE", "LoRA"]
    assert named({}, without) == ["C-LoRAE", "LoRA"]
    assert named(without, with_it) == ["LoRA", "LoRA, loss_weighting=achievement"]


def test_repetitions_may_differ_in_seed_place_and_speed_only() -> None:
    assert set(FIELDS) >= UNDECIDING
    assert {"seed", "output_dir", "dataloader_num_workers", "deepspeed"} <= UNDECIDING <= MAY_CHANGE | {"seed"}
    assert not UNDECIDING & {"per_device_train_batch_size", "gradient_accumulation_steps", "lora_rank", "learning_rate"}


@given(st.lists(st.fixed_dictionaries({}, optional=SETTINGS), min_size=1, max_size=5))
@settings(deadline=None)
def test_names_differ_where_settings_do(given: list[dict[str, Any]]) -> None:
    """Except if values read alike, or two bases have the same last name."""
    configs = [make_config(some) for some in given]
    found = names(configs)
    for one, first in zip(configs, found, strict=True):
        for other, second in zip(configs, found, strict=True):
            a, b = deciding(one), deciding(other)
            differing = [name for name in a if a[name] != b[name]]
            assert first == second if not differing else True
            if first == second:
                assert all(name == "model" or format_value(a[name]) == format_value(b[name]) for name in differing)


def test_values_are_formatted() -> None:
    values = (None, [], True, 0.05, ["q", "v"])
    assert [format_value(value) for value in values] == ["none", "none", "true", "0.05", "q v"]
