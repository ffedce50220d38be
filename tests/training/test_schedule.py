"""Each learning-rate schedule's shape."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.schedule import learning_rate

STEPS, PER_EPOCH = 100, 10


def rates(schedule: str, **settings: Any) -> list[float]:
    config = TrainConfig(schedule=schedule, learning_rate=2.0, **{"warmup": 0.0, **settings})
    return [learning_rate(config, step, STEPS, PER_EPOCH) for step in range(STEPS)]


def test_constant() -> None:
    assert rates("constant") == [2.0] * STEPS


def test_linear() -> None:
    values = rates("linear")
    assert values[0] == 2.0
    assert values[50] == pytest.approx(1.0)
    differences = {round(first - second, 9) for first, second in pairwise(values)}
    assert differences == {0.02}
    assert values[-1] == pytest.approx(0.02)


def test_cosine() -> None:
    values = rates("cosine")
    assert values[0] == 2.0
    assert values[50] == pytest.approx(1.0)
    assert values[25] == pytest.approx(1.0 + 2**-0.5)
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < 0.001


def test_step_halves_at_whole_epochs() -> None:
    values = rates("step", step_epochs=3)
    assert values[:30] == [2.0] * 30
    assert values[30:60] == [1.0] * 30
    assert values[60:90] == [0.5] * 30
    assert values[90:] == [0.25] * 10


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_warm_up_rises_evenly_to_the_peak(schedule: str) -> None:
    values = rates(schedule, warmup=0.1)
    assert values[:10] == pytest.approx([2.0 * (step + 1) / 11 for step in range(10)])
    assert values[10] == 2.0
    assert max(values) == 2.0
    assert min(values) > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_a_run_of_one_step(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, learning_rate=2.0, warmup=0.03)
    assert learning_rate(config, 0, 1, 1) == 2.0
