"""Runs are called by what tells them apart, in the paper's words where it has some."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.analysis.systems import UNDECIDING, deciding, names
from lvlm_clorae.sweep.collect import spelt
from lvlm_clorae.training.config import FIELDS, make_config
from lvlm_clorae.training.run_directory import MAY_CHANGE
from tests.sweep.settings import SETTINGS


def named(*given: dict[str, Any]) -> list[str]:
    return names([make_config(settings) for settings in given])


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ({}, "C-LoRAE"),
        ({"use_experts": False}, "C-LoRAE, only universal"),
        ({"use_universal": False}, "C-LoRAE, only task experts"),
        ({"use_gate": False}, "C-LoRAE, no gate"),
        ({"beta": 0}, "C-LoRAE, no MIM"),
        ({"achievement": False}, "C-LoRAE, no achievement loss"),
        ({"use_gate": False, "beta": 0}, "C-LoRAE, no gate, no MIM"),
        ({"adapter": "lora", "use_gate": False, "beta": 0}, "LoRA"),
        ({"adapter": "moslora"}, "MoSLoRA"),
        ({"adapter": "loramoe"}, "LoRAMoE"),
        ({"adapter": "full"}, "full fine-tuning"),
        ({"adapter": "full", "fusion": "gated", "achievement": False}, "UMIE"),
        ({"adapter": "none"}, "base alone"),
    ],
)
def test_a_run_alone_has_its_system_and_its_ablations(run: dict[str, Any], name: str) -> None:
    assert named(run) == [name]
    assert named({"rank": 3, "seed": 7, "shards": "x", **run}) == [name], "there is nothing to tell it from"


def test_only_what_differs_is_said() -> None:
    common = {"model": "owner/name", "shards": "shards/real", "hold_out": ["m2e2"]}
    assert named(common, {**common, "rank": 32}, {**common, "rank": 32, "beta": 0}) == [
        "C-LoRAE",
        "C-LoRAE, rank=32",
        "C-LoRAE, no MIM, rank=32",
    ]
    assert named({**common, "hold_out": []}, common) == ["C-LoRAE", "C-LoRAE, hold_out=m2e2"]


def test_a_recipe_of_the_base_is_not_said() -> None:
    base, large = ({"model": f"flan-t5-{size}"} for size in ("base", "large"))
    assert make_config(base).rank != make_config(large).rank
    assert named(base, large, {**large, "rank": 128}) == [
        "C-LoRAE flan-t5-base",
        "C-LoRAE flan-t5-large",
        "C-LoRAE flan-t5-large, rank=128",
    ]


def test_the_achievement_loss_is_said_where_it_is_unusual_and_not_everywhere() -> None:
    with_it, without = {"adapter": "lora"}, {"adapter": "lora", "achievement": False}
    assert named({}, with_it) == ["C-LoRAE", "LoRA"]
    assert named({}, without) == ["C-LoRAE", "LoRA"]
    assert named(without, with_it) == ["LoRA", "LoRA, achievement=true"]


def test_what_repetitions_may_differ_in() -> None:
    assert set(FIELDS) >= UNDECIDING
    assert {"seed", "output", "workers", "deepspeed"} <= UNDECIDING <= MAY_CHANGE | {"seed"}
    assert not UNDECIDING & {"micro_batch", "accumulation", "rank", "learning_rate"}


@given(st.lists(st.fixed_dictionaries({}, optional=SETTINGS), min_size=1, max_size=5))
@settings(deadline=None)
def test_names_differ_where_settings_do(given: list[dict[str, Any]]) -> None:
    """Except where values are spelt alike, or two bases have one last name."""
    configs = [make_config(some) for some in given]
    found = names(configs)
    for one, first in zip(configs, found, strict=True):
        for other, second in zip(configs, found, strict=True):
            a, b = deciding(one), deciding(other)
            differing = [name for name in a if a[name] != b[name]]
            assert first == second if not differing else True
            if first == second:
                assert all(name == "model" or spelt(a[name]) == spelt(b[name]) for name in differing)
