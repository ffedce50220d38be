"""Names of points: safe everywhere, different where the settings are."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.sweep.names import LONGEST, point_name
from lvlm_clorae.training.config import FIELDS
from tests.sweep.settings import varied_settings


@pytest.mark.parametrize(
    ("varied", "name"),
    [
        ({"rank": 64, "dropout": 0.05, "seed": 1}, "rank=64,dropout=0.05,seed=1"),
        ({"seed": 1, "match": "umie", "rank": 64}, "rank=64,match=umie,seed=1"),
        ({"learning_rate": 1e-5, "use_gate": False}, "use_gate=false,learning_rate=1e-05"),
        ({"ema": None, "adapter": "none"}, "adapter=none,ema=none"),
        ({"target_modules": ["q", "v"], "hold_out": []}, "target_modules=q+v,hold_out=none"),
        ({}, ""),
    ],
)
def test_names_can_be_read(varied: dict[str, Any], name: str) -> None:
    assert point_name(varied) == name


def test_what_would_read_alike_is_told_apart() -> None:
    alike = [
        [{"vision": None}, {"vision": "none"}],
        [{"hold_out": []}, {"hold_out": ["none"]}],
        [{"hold_out": ["a", "b"]}, {"hold_out": ["a+b"]}],
        [{"shards": "a/b"}, {"shards": "a-b"}, {"shards": "a b"}],
        [{"template": "x" * 40}, {"template": "x" * 41}],
        [{"model": ""}, {"model": "@"}],
    ]
    for values in alike:
        assert len({point_name(varied) for varied in values}) == len(values), values


@given(varied_settings(), varied_settings())
def test_names_are_safe_and_differ(first: dict[str, Any], second: dict[str, Any]) -> None:
    for varied in (first, second):
        assert re.fullmatch(r"[A-Za-z0-9=,._+@-]*", point_name(varied))
        assert len(point_name(varied)) <= LONGEST
    assert (point_name(first) == point_name(second)) == (repr(sorted(first.items())) == repr(sorted(second.items())))


@given(varied_settings(), st.randoms())
def test_the_order_of_the_keys_is_not_in_the_name(varied: dict[str, Any], random: Any) -> None:
    keys = list(varied)
    random.shuffle(keys)
    assert point_name({key: varied[key] for key in keys}) == point_name(varied)


def test_a_name_of_all_settings_is_short_and_keeps_its_seed() -> None:
    everything = {name: "x" * 100 if name != "seed" else 7 for name in FIELDS}
    assert len(point_name(everything)) <= LONGEST
    assert point_name(everything).endswith(",seed=7")
    assert point_name(everything) != point_name({**everything, "deepspeed": "y"})


def test_a_shell_leaves_names_alone(tmp_path: Any) -> None:
    """Without quotes, in a directory whose files could match."""
    names = [
        point_name({"model": "a b$(touch x)*?", "rank": 3, "target_modules": ["q", "~"]}),
        point_name({"template": "{image}\n{prompt}", "ema": 0.5, "seed": 1}),
    ]
    for name in names:
        (tmp_path / name).touch()
    done = subprocess.run(["bash", "-uc", f"printf '%s\\n' {' '.join(names)}"], cwd=tmp_path, capture_output=True)
    assert done.stdout.decode().split("\n")[:-1] == names
