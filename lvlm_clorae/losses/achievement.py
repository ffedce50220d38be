"""Achievement-based multi-task weights (Eqs. 9-10): dataset tasks far below their reference F1 get larger weights.

A dataset task is a dataset with a sub-task, e.g. ``twitter15/entity``. The weights are computed in Python floats, so
that every rank with the same F1 has bit-identical weights. Idea: Yun and Cho, ICCV 2023.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lvlm_clorae.errors import UserError, nearest

NORMALIZATIONS = ("softmax", "sum", "none")


def achievement_weights(
    f1: Mapping[str, float], reference: Mapping[str, float], *, gamma: float, margin: float, normalize: str = "softmax"
) -> dict[str, float]:
    """Return the weight of each dataset task's cross-entropy.

        w = max(0, 1 - f1 / (margin * reference)) ** gamma                                       (9)
        w <- n * softmax(w)   or   n * w / sum(w)   or   w                                      (10)

    The bracket is clamped because a fractional power of a negative number is complex. The factor n, the number of
    dataset tasks, keeps the mean weight at 1, so that the learning rate keeps its meaning.

    Args:
        f1: dev F1 of each dataset task, on the scale of ``reference``; one not yet evaluated counts as 0.
        reference: F1 of the best single-task system for each dataset task.
        gamma: above 0; a larger value increases the differences.
        margin: above 1; multiple of the reference at which the weight becomes 0.
        normalize: ``softmax``, ``sum`` (equal weights if all are 0) or ``none``.

    Raises:
        UserError: a setting is out of range, a dataset task has no reference, or an F1 is negative or not finite.
    """
    _check(reference, gamma, margin, normalize)
    _check_f1(f1, reference)
    raw = {name: max(0.0, 1.0 - f1.get(name, 0.0) / (margin * goal)) ** gamma for name, goal in reference.items()}
    if normalize == "none":
        return raw
    mass = {name: math.exp(w) for name, w in raw.items()} if normalize == "softmax" else raw
    total = math.fsum(mass.values())
    if total == 0.0:
        return dict.fromkeys(raw, 1.0)
    return {name: len(mass) * w / total for name, w in mass.items()}


def _check(reference: Mapping[str, float], gamma: float, margin: float, normalize: str) -> None:
    if normalize not in NORMALIZATIONS:
        raise UserError(f'Unknown normalize "{normalize}".{nearest(normalize, NORMALIZATIONS)}')
    if not 0 < gamma < math.inf:
        raise UserError(f"The achievement loss needs gamma > 0, not {gamma}.")
    if not 1 < margin < math.inf:
        raise UserError(f"The achievement loss needs margin > 1, not {margin}: at 1 the weight at the reference is 0.")
    if not reference:
        raise UserError("The achievement loss needs a reference F1 for each dataset task: give at least one.")
    for name, value in reference.items():
        if not 0 < value < math.inf:
            raise UserError(f"The reference F1 of {name} must be above 0, not {value}.")


def _check_f1(f1: Mapping[str, float], reference: Mapping[str, float]) -> None:
    for name, value in f1.items():
        if name not in reference:
            raise UserError(f'No reference F1 for the dataset task "{name}".{nearest(name, reference)}')
        if not 0 <= value < math.inf:
            raise UserError(f"The F1 of {name} must be finite and at least 0, not {value}.")


class AchievementState:
    """The current weights, the F1 they are computed from, and their part of a checkpoint.

    Before the first :meth:`update` every F1 is 0, so the weights are equal.

    Args:
        dataset_tasks: names of the dataset tasks that are trained, in any order.
        reference: reference F1 of at least these.
        ema: weight of the old F1 in an exponential moving average (0.9 in Yun and Cho's code). Default: no average.
            The first F1 of a dataset task is never averaged.
        settings: ``gamma``, ``margin`` and ``normalize`` of :func:`achievement_weights`.

    Raises:
        UserError: as :func:`achievement_weights`; a missing reference; ``ema`` outside [0, 1).
    """

    def __init__(
        self, dataset_tasks: Iterable[str], reference: Mapping[str, float], *, ema: float | None = None, **settings: Any
    ) -> None:
        names = list(dataset_tasks)
        missing = [name for name in names if name not in reference]
        if missing:
            raise UserError(f"No reference F1 for {', '.join(missing)}: give one, or train without achievement loss.")
        if ema is not None and not 0.0 <= ema < 1.0:
            raise UserError(f"ema, the weight of the old F1, must be in [0, 1), not {ema}.")
        self.reference = {name: float(reference[name]) for name in names}
        self.ema, self.settings = ema or 0.0, settings
        self.f1: dict[str, float] = {}
        self.weights = achievement_weights(self.f1, self.reference, **settings)

    def update(self, f1: Mapping[str, float]) -> dict[str, float]:
        """Take the dev F1 of an epoch and return the new weights; dataset tasks without a new F1 keep their last.

        One that never had an F1, since it has no dev split, gets the mean weight of the others.
        """
        _check_f1(f1, self.reference)
        for name, new in f1.items():
            self.f1[name] = self.ema * self.f1[name] + (1 - self.ema) * new if name in self.f1 else float(new)
        evaluated = {name: goal for name, goal in self.reference.items() if name in self.f1}
        weights = achievement_weights(self.f1, evaluated or self.reference, **self.settings)
        mean = math.fsum(weights.values()) / len(weights)
        self.weights = {name: weights.get(name, mean) for name in self.reference}
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """Return the (averaged) F1 and the current weights, in JSON types."""
        return {"f1": dict(self.f1), "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state of the same dataset tasks (else UserError); its weights hold until :meth:`update`."""
        if set(state["weights"]) != set(self.reference):
            raise UserError(
                f"The checkpoint's achievement weights are for {sorted(state['weights'])}, this run trains "
                f"{sorted(self.reference)}. Resume with the same datasets, or start a new run from the adapter."
            )
        if not all(0 <= value < float("inf") for found in (state["f1"], state["weights"]) for value in found.values()):
            raise ValueError("f1 and weights must be finite and not negative")
        self.f1 = {name: float(value) for name, value in state["f1"].items()}
        self.weights = {name: float(state["weights"][name]) for name in self.reference}
