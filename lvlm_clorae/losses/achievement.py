"""Achievement-based multi-task weights (Eqs. 9-10): what lags behind its reference weighs more.

Pure Python floats, so that every rank that is given the same F1 has the same weights bit for bit. The unit is a dataset
and sub-task, e.g. ``twitter15/entity``. Idea: Yun and Cho, ICCV 2023.

Softmax, the paper's choice and the default, is nearly flat because the brackets lie in [0, 1]: achievements of
.95, .8, .6 of the reference give shares .31, .32, .37 at gamma 2, margin 1.05, where ``sum`` gives .04, .23, .74.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lvlm_clorae.errors import UserError, nearest

NORMALISATIONS = ("softmax", "sum", "none")


def achievement_weights(
    f1: Mapping[str, float],
    reference: Mapping[str, float],
    *,
    gamma: float,
    margin: float,
    normalise: str = "softmax",
) -> dict[str, float]:
    """The weight of each unit's cross-entropy.

        w = max(0, 1 - f1 / (margin * reference)) ** gamma                                       (9)
        w <- n * softmax(w)   or   n * w / sum(w)   or   w                                      (10)

    The bracket is clamped because a fractional gamma turns a negative base into a complex number; the factor n, the
    number of units, keeps the mean weight at 1 and so the learning rate its meaning.

    Args:
        f1: dev F1 of each unit, on the scale of ``reference``; a unit not yet evaluated may be missing and counts as 0
        reference: F1 of the best single-task system for each unit; its keys are the units
        gamma: above 0; larger stresses the units that lag
        margin: above 1; how far beyond the reference a unit still earns weight
        normalise: ``softmax``, ``sum`` (equal weights where all are 0) or ``none``

    Raises:
        UserError: a setting out of range, an F1 for a unit without reference, or an F1 that is negative or no number.
    """
    _check(reference, gamma, margin, normalise)
    _check_f1(f1, reference)
    raw = {
        unit: max(0.0, 1.0 - f1.get(unit, 0.0) / (margin * reference_f1)) ** gamma
        for unit, reference_f1 in reference.items()
    }
    if normalise == "none":
        return raw
    mass = {unit: math.exp(w) for unit, w in raw.items()} if normalise == "softmax" else raw
    total = math.fsum(mass.values())
    if total == 0.0:
        return dict.fromkeys(raw, 1.0)
    return {unit: len(mass) * w / total for unit, w in mass.items()}


def _check(reference: Mapping[str, float], gamma: float, margin: float, normalise: str) -> None:
    if normalise not in NORMALISATIONS:
        raise UserError(f'Unknown normalise "{normalise}".{nearest(normalise, NORMALISATIONS)}')
    if not (gamma > 0 and math.isfinite(gamma)):
        raise UserError(f"The achievement loss needs gamma > 0, not {gamma}.")
    if not (margin > 1 and math.isfinite(margin)):
        raise UserError(
            f"The achievement loss needs margin > 1, not {margin}: at 1 a unit that meets its reference gets no weight."
        )
    if not reference:
        raise UserError("The achievement loss needs a reference F1 for each unit; none was given.")
    for unit, value in reference.items():
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"The reference F1 of {unit} must be above 0, not {value}.")


def _check_f1(f1: Mapping[str, float], reference: Mapping[str, float]) -> None:
    for unit, value in f1.items():
        if unit not in reference:
            raise UserError(f'No reference F1 for the unit "{unit}".{nearest(unit, reference)}')
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"The F1 of {unit} must be a number from 0, not {value}.")


class AchievementState:
    """The weights in force, what they came from, and their part of a checkpoint.

    Before the first :meth:`update` every F1 is 0, so the weights are equal.

    Args:
        units: the training units, in any order
        reference: reference F1 of at least these units
        gamma, margin, normalise: see :func:`achievement_weights`
        ema: weight of the old F1 in a moving average (0.9 in Yun and Cho's code); None, the default, takes F1 as it is.
            A unit's first F1 is taken as it is in either case.

    Raises:
        UserError: as :func:`achievement_weights`; a unit without reference; ``ema`` outside [0, 1).
    """

    def __init__(
        self,
        units: Iterable[str],
        reference: Mapping[str, float],
        *,
        gamma: float,
        margin: float,
        normalise: str = "softmax",
        ema: float | None = None,
    ) -> None:
        units = list(units)
        missing = [unit for unit in units if unit not in reference]
        if missing:
            raise UserError(f"No reference F1 for {', '.join(missing)}: give one, or train without achievement loss.")
        if ema is not None and not 0.0 <= ema < 1.0:
            raise UserError(f"ema is the weight of the old F1, in [0, 1), not {ema}.")
        self.reference = {unit: float(reference[unit]) for unit in units}
        self.gamma, self.margin, self.normalise, self.ema = gamma, margin, normalise, ema
        self.f1: dict[str, float] = {}
        self.weights = self._weigh()

    @property
    def units(self) -> list[str]:
        return list(self.reference)

    def update(self, f1: Mapping[str, float]) -> dict[str, float]:
        """Take the dev F1 of an epoch (units not evaluated keep their last one) and return the new weights."""
        _check_f1(f1, self.reference)
        for unit, new in f1.items():
            old = self.f1.get(unit)
            smooth = self.ema is not None and old is not None
            self.f1[unit] = self.ema * old + (1 - self.ema) * new if smooth else float(new)  # type: ignore[operator]
        self.weights = self._weigh()
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the (smoothed) F1 so far and the weights in force."""
        return {"f1": dict(self.f1), "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; the saved weights hold until the next :meth:`update`, whatever the settings are now.

        Raises:
            UserError: the saved units are not this run's.
        """
        if set(state["weights"]) != set(self.reference):
            raise UserError(
                f"The checkpoint's achievement weights are for {sorted(state['weights'])}, this run trains "
                f"{sorted(self.reference)}. Resume with the same datasets, or start a new run from the adapter."
            )
        self.f1 = {unit: float(value) for unit, value in state["f1"].items()}
        self.weights = {unit: float(state["weights"][unit]) for unit in self.reference}

    def _weigh(self) -> dict[str, float]:
        return achievement_weights(
            self.f1, self.reference, gamma=self.gamma, margin=self.margin, normalise=self.normalise
        )
