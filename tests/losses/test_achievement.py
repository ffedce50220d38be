"""Eqs. (9)-(10) by hand, at their limits, and properties for any F1."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.losses.achievement import NORMALIZATIONS, AchievementState, achievement_weights

REFERENCE = {"twitter15/entity": 78.9, "mre_v1/relation": 81.8, "m2e2/argument": 23.4}
SETTINGS = {"gamma": 2.0, "margin": 1.05}


def at(*achievements: float) -> dict[str, float]:
    return {name: a * p for (name, p), a in zip(REFERENCE.items(), achievements, strict=True)}


def shares(normalize: str) -> list[float]:
    weights = achievement_weights(at(0.95, 0.8, 0.6), REFERENCE, normalize=normalize, **SETTINGS)
    return [round(weight / 3, 2) for weight in weights.values()]


def test_shares_in_the_docstring():
    assert shares("softmax") == [0.31, 0.32, 0.37]
    assert shares("sum") == [0.04, 0.23, 0.74]


def test_weights_equal_the_equations():
    raw = [(1 - a / 1.05) ** 2 for a in (0.95, 0.8, 0.6)]
    weights = achievement_weights(at(0.95, 0.8, 0.6), REFERENCE, normalize="none", **SETTINGS)
    assert list(weights.values()) == pytest.approx(raw)
    soft = achievement_weights(at(0.95, 0.8, 0.6), REFERENCE, **SETTINGS)
    total = sum(math.exp(w) for w in raw)
    assert list(soft.values()) == pytest.approx([3 * math.exp(w) / total for w in raw])


def test_weight_above_the_margin_is_a_real_zero_for_fractional_gamma():
    weights = achievement_weights(at(1.4, 0.9, 0.9), REFERENCE, gamma=0.5, margin=1.05, normalize="none")
    assert weights["twitter15/entity"] == 0.0
    assert all(type(weight) is float for weight in weights.values())


def test_weights_are_equal_if_all_are_above_their_margin():
    for normalize in ("softmax", "sum"):
        weights = achievement_weights(at(2, 2, 2), REFERENCE, normalize=normalize, **SETTINGS)
        assert list(weights.values()) == [1.0, 1.0, 1.0]


def test_missing_f1_counts_as_zero():
    assert achievement_weights({}, REFERENCE, **SETTINGS) == achievement_weights(at(0, 0, 0), REFERENCE, **SETTINGS)
    assert set(achievement_weights({}, REFERENCE, **SETTINGS).values()) == {1.0}


f1s = st.lists(st.floats(0, 100), min_size=3, max_size=3)
settings = st.fixed_dictionaries({"gamma": st.floats(0.05, 8), "margin": st.floats(1.001, 3)})


@given(f1s, settings, st.sampled_from(["softmax", "sum"]))
def test_mean_weight_is_one(values, chosen, normalize):
    weights = achievement_weights(dict(zip(REFERENCE, values, strict=True)), REFERENCE, normalize=normalize, **chosen)
    assert math.fsum(weights.values()) / 3 == pytest.approx(1.0)
    assert all(math.isfinite(weight) and weight >= 0 for weight in weights.values())


@given(f1s, st.floats(0, 100), settings, st.sampled_from(NORMALIZATIONS))
def test_a_lower_f1_never_has_a_smaller_weight(values, lower, chosen, normalize):
    f1 = dict(zip(REFERENCE, values, strict=True))
    name = "mre_v1/relation"
    worse = f1 | {name: min(lower, f1[name])}
    before = achievement_weights(f1, REFERENCE, normalize=normalize, **chosen)[name]
    after = achievement_weights(worse, REFERENCE, normalize=normalize, **chosen)[name]
    if sum(achievement_weights(f1, REFERENCE, normalize="none", **chosen).values()) > 0:  # not the equal fall-back
        assert after >= before - 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": 1.0}, "margin > 1"),
        ({"gamma": 0.0}, "gamma > 0"),
        ({"gamma": float("nan")}, "gamma > 0"),
        ({"reference": {"a": 0.0}}, "reference F1 of a"),
        ({"reference": {}}, "reference F1"),
        ({"normalize": "sofmax"}, "softmax"),
        ({"f1": {"twitter15/entitty": 1.0}}, 'twitter15/entity"'),
        ({"f1": {"twitter15/entity": float("nan")}}, "nan"),
        ({"f1": {"twitter15/entity": -1.0}}, r"-1\.0"),
    ],
)
def test_errors(change, message):
    arguments = {"f1": {}, "reference": REFERENCE, **SETTINGS, **change}
    f1, reference = arguments.pop("f1"), arguments.pop("reference")
    with pytest.raises(UserError, match=message):
        achievement_weights(f1, reference, **arguments)


def test_state_starts_equal_updates_and_survives_json():
    state = AchievementState(list(REFERENCE), REFERENCE | {"unused/task": 50.0}, normalize="sum", **SETTINGS)
    assert state.weights == dict.fromkeys(REFERENCE, 1.0)
    assert state.update(at(0.95, 0.8, 0.6)) == achievement_weights(
        at(0.95, 0.8, 0.6), REFERENCE, normalize="sum", **SETTINGS
    )
    again = AchievementState(reversed(state.reference), REFERENCE, normalize="sum", **SETTINGS)
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert again.weights == state.weights
    partial = {"m2e2/argument": 20.0}
    assert again.update(partial) == pytest.approx(state.update(partial))
    assert state.f1["twitter15/entity"] == pytest.approx(0.95 * 78.9)  # not evaluated again: keeps its last F1


def test_one_without_a_dev_split_has_the_mean_weight_of_the_others():
    state = AchievementState("abc", dict.fromkeys("abc", 50.0), gamma=2.0, margin=1.05)
    for f1 in (0.0, 30.0, 100.0):
        weights = state.update({"a": f1, "b": 10.0})
        alone = achievement_weights({"a": f1, "b": 10.0}, dict.fromkeys("ab", 50.0), gamma=2.0, margin=1.05)
        assert weights == {**alone, "c": pytest.approx(1.0)}
    again = AchievementState("abc", dict.fromkeys("abc", 50.0), gamma=2.0, margin=1.05)
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert again.weights == state.weights


def test_moving_average():
    state = AchievementState(["a"], {"a": 80.0}, ema=0.9, normalize="none", **SETTINGS)
    state.update({"a": 40.0})
    assert state.f1["a"] == 40.0
    state.update({"a": 60.0})
    assert state.f1["a"] == pytest.approx(0.9 * 40 + 0.1 * 60)
    assert state.weights["a"] == pytest.approx((1 - 42 / (1.05 * 80)) ** 2)


def test_state_errors():
    with pytest.raises(UserError, match="new/task"):
        AchievementState(["new/task"], REFERENCE, **SETTINGS)
    with pytest.raises(UserError, match="ema"):
        AchievementState(list(REFERENCE), REFERENCE, ema=1.0, **SETTINGS)
    state = AchievementState(list(REFERENCE), REFERENCE, **SETTINGS)
    with pytest.raises(UserError, match="other/task"):
        state.load_state_dict({"f1": {}, "weights": {"other/task": 1.0}})
