"""The paper's figures, and which run each row belongs to."""

from __future__ import annotations

from typing import Any

import pytest

from lvlm_clorae.analysis.paper import ROWS, UNITS, PaperRow, paper_row, unlike
from lvlm_clorae.data.convert import CONVERTERS
from lvlm_clorae.data.convert.m2e2 import SPEC as M2E2
from lvlm_clorae.training.config import make_config


def row(name: str) -> PaperRow:
    [found] = [row for row in ROWS if row.name == name]
    return found


def test_all_is_the_sum_but_where_the_paper_misprints() -> None:
    """C-LoRAE base is 0.4 off; large has 0.5 more for MED in Table 2 than in Table 3."""
    off = {}
    for found in ROWS:
        if "All" in found.f1:
            gap = round(found.f1["All"] - sum(found.f1[unit] for unit in UNITS), 1)
            off |= {found.name: gap} if gap else {}
    assert off == {"C-LoRAE base": -0.4, "C-LoRAE large": -0.5}


def test_rows_are_distinct_and_of_known_datasets() -> None:
    assert len({row.name for row in ROWS}) == len({row.recipe for row in ROWS}) == len(ROWS) == 21
    assert {unit.partition("/")[0] for unit in UNITS} <= set(CONVERTERS)
    assert [unit for unit in UNITS if unit.startswith("m2e2/")] == [f"m2e2/{subtask}" for subtask in M2E2.subtasks]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"model": "flan-t5-base"}, "C-LoRAE base"),
        ({"model": "google/flan-t5-xl"}, "C-LoRAE xl"),
        ({"model": "/data/flan-t5-large", "beta": 0.0}, "C-LoRAE large, no MIM"),
        ({"model": "flan-t5-base", "beta": 0.0}, None),
        ({"model": "flan-t5-large", "beta": 0.0, "use_gate": False}, None),
        ({"model": "flan-t5-large", "adapter": "full"}, "UMIE large"),
        ({"model": "flan-t5-xl", "adapter": "lora"}, None),
        ({"model": "flan-t5-base", "adapter": "none"}, None),
        ({"model": "demo"}, None),
        (
            {"model": "flan-t5-base", "hold_out": ["mre_v2", "m2e2", "twitter17"]},
            "C-LoRAE base, twitter17 and mre_v2 held out",
        ),
        ({"model": "flan-t5-base", "hold_out": ["mre_v2"]}, None),
    ],
)
def test_a_run_is_put_beside_the_row_of_its_system(settings: dict[str, Any], name: str | None) -> None:
    found = paper_row(make_config(settings))
    assert (found.name if found else None) == name


def test_what_is_otherwise_than_in_the_recipe() -> None:
    large, umie = row("C-LoRAE large"), row("UMIE large")
    settings: dict[str, Any] = {"model": "/data/flan-t5-large", "shards": "elsewhere", "hold_out": ["m2e2"], "seed": 3}
    assert unlike(make_config(settings), large) == {"mim_tokens": 0}, "a path has no preset, whose recipe draws tokens"
    settings["mim_tokens"] = 12
    assert unlike(make_config(settings), large) == {}
    assert unlike(make_config({**settings, "rank": 32, "fusion": "gated", "workers": 4}), large) == {
        "rank": 32,
        "fusion": "gated",
    }
    assert unlike(make_config({**settings, "hold_out": []}), large) == {"hold_out": []}
    assert unlike(make_config({**settings, "adapter": "full", "fusion": "gated", "achievement": False}), umie) == {}
    assert unlike(make_config({**settings, "beta": 0.0}), row("C-LoRAE large, no MIM")) == {}
    unseen = row("C-LoRAE large, twitter17 and mre_v2 held out")
    assert unlike(make_config({**settings, "hold_out": ["mre_v2", "m2e2", "twitter17"]}), unseen) == {}
