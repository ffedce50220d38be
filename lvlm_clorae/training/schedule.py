"""Learning rates as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from lvlm_clorae.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total_steps``.

    A linear warm-up over ``config.warmup`` of all steps, then ``constant``, ``linear`` or ``cosine`` to zero, or
    ``step``: halved every ``step_epochs`` epochs (the paper's decay factor 0.5).
    """
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    factors = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "step": 0.5 ** (step // max(1, config.step_epochs * steps_per_epoch)),
    }
    return config.learning_rate * factors[config.schedule]
