"""CoBa's weights against the paper's equations in float64, its state and its errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.losses.coba import CoBaState, absolute_scores, divergence_factor, relative_scores, slope

TASKS = ["twitter15/entity", "mre_v1/relation", "m2e2/trigger"]
SETTINGS = {"history_length": 5, "warmup": 3, "tau": 5.0}


def softmax(values: np.ndarray) -> np.ndarray:
    mass = np.exp(values - values.max())
    return mass / mass.sum()


def equations(losses: np.ndarray, N: int, W: int, tau: float) -> np.ndarray:
    """Weights after the last of the measurements ``[T, K]``, from the paper's equations; slopes count from W."""
    T, K = losses.shape
    ratios = losses / losses[0]
    if T <= W:
        return np.ones(K)
    alpha = np.array(
        [
            [np.polyfit(np.arange(start, t + 1), ratios[start : t + 1, i], 1)[0] for i in range(K)]
            for t in range(W, T)
            for start in [max(0, t - N + 1)]
        ]
    )
    now, window = alpha[-1], alpha[-N:]
    rcs = softmax(K * now / np.abs(now).sum())
    acs = softmax(-len(window) * now / np.abs(window).sum(0))
    largest = alpha.max(1)
    t = len(largest)
    df = min(t * softmax(-tau * t * largest / largest.sum())[-1], 1)
    return K * (df * rcs + (1 - df) * acs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("settings", [SETTINGS, {"history_length": 2, "warmup": 1, "tau": 0.5}])
def test_weights_equal_the_equations_at_every_measurement(seed: int, settings: dict) -> None:
    generator = np.random.default_rng(seed)
    steps = np.arange(20)[:, None]
    losses = 2 * np.exp(-steps * generator.uniform(-0.1, 0.1, 3)) + generator.uniform(0, 0.1, (20, 3))
    state, seen = CoBaState(TASKS, TASKS, **settings), set()
    for number in range(20):
        weights = state.update(dict(zip(TASKS, losses[number], strict=True)))
        expected = equations(losses[: number + 1], settings["history_length"], settings["warmup"], settings["tau"])
        assert list(weights.values()) == pytest.approx(expected, abs=1e-10)
        seen.add(state.divergence)
    assert len(seen) > 5, "both scores have contributed"


def test_a_slope_is_that_of_the_least_squares_line() -> None:
    values = [3.0, 1.0, 2.5, 0.5]
    assert slope(values) == pytest.approx(np.polyfit(range(4), values, 1)[0])
    assert (slope([2.0]), slope([])) == (0.0, 0.0)


def test_scores_favour_slow_convergence_and_not_divergence() -> None:
    slow, fast = relative_scores([-0.01, -0.2])
    assert slow > fast
    steady, diverging = absolute_scores([[-0.1, -0.1], [-0.1, 0.1]])
    assert steady > diverging
    assert divergence_factor([-0.1] * 4, 5.0) == divergence_factor([-0.4, -0.2, -0.1], 5.0) == 1.0
    assert divergence_factor([-0.1, 0.3, 0.1, 0.4], 5.0) < 0.01
    assert relative_scores([0.0, 0.0]) == absolute_scores([[0.0], [0.0]]) == [0.5, 0.5]


@given(st.lists(st.tuples(*[st.floats(1e-3, 1e3)] * 3), min_size=1, max_size=12))
def test_weights_are_finite_not_negative_and_have_mean_one(losses: list[tuple[float, ...]]) -> None:
    state = CoBaState([*TASKS, "without/dev"], TASKS, **SETTINGS)
    for found in losses:
        weights = state.update(dict(zip(TASKS, found, strict=True)))
        assert weights["without/dev"] == 1.0
        assert min(weights.values()) >= 0
        assert sum(weights.values()) == pytest.approx(4)


def test_a_restored_state_continues_with_identical_weights() -> None:
    generator = np.random.default_rng(0)
    states = [CoBaState(TASKS, TASKS, **SETTINGS)]
    for number in range(12):
        losses = dict(zip(TASKS, generator.uniform(1, 2, 3).tolist(), strict=True))
        found = [state.update(losses) for state in states]
        assert all(weights == found[0] for weights in found)
        if number in (0, 2, 6):  # before, at and after the end of the warm-up
            states.append(CoBaState(TASKS, TASKS, **SETTINGS))
            states[-1].load_state_dict(json.loads(json.dumps(states[0].state_dict())))
    assert len(states[0].ratios[TASKS[0]]) == len(states[0].slopes[TASKS[0]]) == 5, "bounded by history_length"


def test_errors() -> None:
    with pytest.raises(UserError, match="dev split"):
        CoBaState(TASKS, ["other/entity"], **SETTINGS)
    state = CoBaState(TASKS, TASKS, **SETTINGS)
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="mre_v1/relation"):
            state.update(dict.fromkeys(TASKS, 1.0) | {"mre_v1/relation": value})
    saved = state.state_dict()
    for other in (CoBaState(["a"], ["a"], **SETTINGS), CoBaState(TASKS, TASKS[:1], **SETTINGS)):
        with pytest.raises(UserError, match="same datasets"):
            other.load_state_dict(saved)
    for change in ({"divergence": float("nan")}, {"measurements": "3"}, {"largest": ["x"]}):
        with pytest.raises((ValueError, TypeError)):
            state.load_state_dict({**saved, **change})
    with pytest.raises(KeyError):
        state.load_state_dict({name: value for name, value in saved.items() if name != "slopes"})
