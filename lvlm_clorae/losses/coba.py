"""CoBa, weights that balance the convergence of dataset tasks (Gong et al., EMNLP 2024, arXiv 2410.06741).

At measurement t every dataset task i of K has the ratio of its dev loss to that at the start, and the slope alpha_i(t)
of the line fitted to its last N ratios. With sums over tasks i, measurements j of the last N, and all s up to t:

    RCS_i = softmax over i (K alpha_i(t) / sum_i |alpha_i(t)|)                slow tasks gain weight
    ACS_i = softmax over i (-N alpha_i(t) / sum_j |alpha_i(j)|)               diverging tasks lose weight
    DF    = min(1, t softmax over s (-tau t alpha_max(s) / sum_s alpha_max(s)) at t),    alpha_max = max over i
    w_i   = K (DF RCS_i + (1 - DF) ACS_i)

The paper's weights sum to 1; the factor K keeps their mean at 1, so that the learning rate keeps its meaning.
docs/method.md says where the released code differs. Everything is computed in Python floats.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lvlm_clorae.errors import UserError


def slope(values: Sequence[float]) -> float:
    """Return the slope of the least-squares line through values at 0, 1, ...; 0 for fewer than two."""
    center = (len(values) - 1) / 2
    square = math.fsum((x - center) ** 2 for x in range(len(values)))
    return math.fsum((x - center) * value for x, value in enumerate(values)) / square if square else 0.0


def relative_scores(slopes: Sequence[float]) -> list[float]:
    """Return RCS of each task from the slopes of all at one measurement."""
    return _softmax([len(slopes) * share for share in _shares(slopes)])


def absolute_scores(histories: Sequence[Sequence[float]]) -> list[float]:
    """Return ACS of each task from the last slopes of each, the newest last."""
    return _softmax([-len(history) * _shares(history)[-1] for history in histories])


def divergence_factor(largest: Sequence[float], tau: float) -> float:
    """Return DF from the largest slope of any task at each measurement, the newest last.

    It is 1 while the slopes add up to convergence, and falls when the newest exceeds the mean of a positive sum.
    """
    t, total = len(largest), math.fsum(largest)
    return min(1.0, t * _softmax([-tau * t * value / total if total else 0.0 for value in largest])[-1])


def _shares(values: Sequence[float]) -> list[float]:
    total = math.fsum(map(abs, values))
    return [value / total if total else 0.0 for value in values]


def _softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    mass = [math.exp(value - highest) for value in values]
    return [one / math.fsum(mass) for one in mass]


_STATE = ("weights", "first", "ratios", "slopes", "largest", "divergence", "measurements")


class CoBaState:
    """The current weights, the losses and slopes they are computed from, and their part of a checkpoint.

    Weights are 1 until ``warmup`` measurements follow the first. Slopes count from then on, as in the released code:
    the steep ones at the start would otherwise dominate DF for the whole run.

    Args:
        dataset_tasks: names of the dataset tasks that are trained.
        measured: those with a dev loss; the weight of the others stays 1, the mean.
        history_length: N, measurements to which a line is fitted, at least 2.
        warmup: measurements, at least 1, since a line needs two.
        tau: sharpness of the divergence factor.

    Raises:
        UserError: no dataset task has a dev loss.
    """

    def __init__(
        self, dataset_tasks: Iterable[str], measured: Iterable[str], *, history_length: int, warmup: int, tau: float
    ) -> None:
        self.weights = dict.fromkeys(dataset_tasks, 1.0)
        self.history_length, self.warmup, self.tau = history_length, max(1, warmup), tau
        self.first: dict[str, float] = {}
        self.ratios: dict[str, list[float]] = {name: [] for name in measured if name in self.weights}
        self.slopes: dict[str, list[float]] = {name: [] for name in self.ratios}
        self.largest: list[float] = []
        self.divergence, self.measurements = 1.0, 0
        if not self.ratios:
            raise UserError("CoBa weights follow the dev losses, but no trained dataset has a dev split: add one.")

    def update(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Take the dev losses of a measurement and return the new weights. Raises UserError for an invalid loss."""
        for name in self.ratios:
            if not 0 < losses[name] < math.inf:
                raise UserError(f"The dev loss of {name} must be finite and above 0 for CoBa, not {losses[name]}.")
        self.first = self.first or dict(losses)
        for name, found in self.ratios.items():
            found.append(losses[name] / self.first[name])
            del found[: -self.history_length]
        self.measurements += 1
        if self.measurements > self.warmup:
            self._weigh()
        return self.weights

    def _weigh(self) -> None:
        for name, found in self.slopes.items():
            found.append(slope(self.ratios[name]))
            del found[: -self.history_length]
        current = [found[-1] for found in self.slopes.values()]
        self.largest.append(max(current))
        relative, absolute = relative_scores(current), absolute_scores(list(self.slopes.values()))
        df = self.divergence = divergence_factor(self.largest, self.tau)
        for name, rcs, acs in zip(self.slopes, relative, absolute, strict=True):
            self.weights[name] = len(current) * (df * rcs + (1 - df) * acs)

    def state_dict(self) -> dict[str, Any]:
        """Return losses, slopes and weights, in JSON types."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state of the same dataset tasks (else UserError)."""
        if state["weights"].keys() != self.weights.keys() or state["ratios"].keys() != self.ratios.keys():
            raise UserError(
                f"The checkpoint's CoBa weights are for {sorted(state['weights'])}, measured on dev for "
                f"{sorted(state['ratios'])}; this run trains {sorted(self.weights)} and measures "
                f"{sorted(self.ratios)}. Resume with the same datasets, or start a new run from the adapter."
            )
        histories = [*state["ratios"].values(), *state["slopes"].values(), state["largest"]]
        numbers = [*state["weights"].values(), *state["first"].values(), *(x for found in histories for x in found)]
        if not all(map(math.isfinite, [*numbers, state["divergence"]])) or type(state["measurements"]) is not int:
            raise ValueError("losses, slopes and weights must be finite")
        for name in _STATE:
            setattr(self, name, state[name])
