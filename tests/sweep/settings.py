"""Values that the settings of a point may have, for property tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from lvlm_clorae.data.settings import INTERLEAVES
from lvlm_clorae.training.config import ADAPTERS

TEXT = st.text(st.characters(codec="utf-8"), max_size=50)
LISTS = st.lists(TEXT, max_size=4)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["demo", "flan-t5-base", "owner/name"]) | TEXT,
    "vision": st.none() | st.just("none") | TEXT,
    "template": st.none() | TEXT,
    "vision_layer": st.none() | st.integers(-9, 9),
    "load_in_8bit": st.booleans(),
    "adapter": st.sampled_from(ADAPTERS),
    "rank": st.integers(1, 1 << 40),
    "alpha": st.none() | st.floats(1e-300, 1e300),
    "dropout": st.floats(0, 0.99),
    "target_modules": LISTS,
    "hold_out": LISTS,
    "use_gate": st.booleans(),
    "shards": TEXT,
    "interleave": st.sampled_from(INTERLEAVES),
    "gamma": st.floats(0.1, 9),
    "margin": st.floats(1.01, 9),
    "beta": st.floats(0, 9),
    "ema": st.none() | st.floats(0, 0.9),
    "max_steps": st.none() | st.integers(1, 99),
    "learning_rate": st.floats(1e-9, 1),
    "deepspeed": TEXT,
}


def varied_settings() -> st.SearchStrategy[dict[str, Any]]:
    """Some settings with values of the configuration's types; a seed with them or not."""
    return st.fixed_dictionaries({}, optional={**SETTINGS, "seed": st.integers(0, 1 << 62)})
