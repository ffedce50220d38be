"""Systems, runs and their order: the next runs to do, given the results so far.

Every system is tuned on the same grid of learning rates and tuning seeds; the grid is widened while the best rate is at
its end. Systems are then compared on evaluation seeds at their best rates, in pairs with the same seed and data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

MAIN = ("C-LoRAE", "LoRA, 2r")
"""The main contrast; the first system is compared with all others."""


@dataclass(frozen=True)
class System:
    """A system to train.

    Args:
        settings: settings besides those of every run
        seeds: number of evaluation seeds, from 0
        like: the system whose best rate is used instead of tuning
        rate: a fixed rate instead of tuning
        task: the only task to train; by default all
        grid: learning rates for tuning, by default the plan's
    """

    settings: Mapping[str, Any]
    seeds: int = 5
    like: str | None = None
    rate: float | None = None
    task: str | None = None
    grid: tuple[float, ...] | None = None

    @property
    def tuned(self) -> bool:
        """Tell whether the system is tuned."""
        return self.like is None and self.rate is None


@dataclass(frozen=True)
class Run:
    """One run."""

    variant: str
    system: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        words = "".join(letter if letter.isalnum() else " " for letter in self.system.lower()).split()
        return f"{self.variant}_{'-'.join(words)}_{self.rate:g}_{self.seed}"


@dataclass(frozen=True)
class Result:
    """Final F1 of a run by dataset task in percent, on dev and on test.

    Args:
        curve: the training: step, dataset task and cross-entropy of each logged step, and dev F1 after an epoch
        gradient_share: median of the logged shares ||beta grad aux|| / ||grad CE||; None without an auxiliary loss
    """

    dev: Mapping[str, float]
    test: Mapping[str, float]
    seconds: float = field(default=0.0, compare=False)
    curve: Sequence[Mapping[str, Any]] = field(default=(), compare=False)
    gradient_share: float | None = field(default=None, compare=False)


Results = Mapping[Run, Result]


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison.

    Args:
        systems: systems by name
        order: (variant, system) in the order in which they are trained
        grid: learning rates for tuning
        tuning_seeds: seeds for tuning, which are not evaluation seeds
        widest: bounds of the grid when it is widened; None: it is not
    """

    systems: Mapping[str, System]
    order: tuple[tuple[str, str], ...]
    grid: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    widest: tuple[float, float] | None = None

    def missing(self, results: Results) -> list[Run]:
        """The runs known to be needed that are not done."""
        wanted: list[Run] = []
        for variant, system in self.order:
            if self.systems[system].tuned:
                wanted += self._tuning(variant, system, self.rates(results, variant, system))
            wanted += self.evaluation(results, variant, system)
        return [run for run in wanted if run not in results]

    def rates(self, results: Results, variant: str, system: str) -> list[float]:
        """The grid, widened on the side where its best rate is the last one; a single rate is not widened."""
        grid = list(self.systems[system].grid or self.grid)
        while (
            self.widest
            and len(grid) > 1
            and (best := self._best_of(results, variant, system, grid)) in (grid[0], grid[-1])
        ):
            wider = best / 2 if best == grid[0] else best * 2
            if not self.widest[0] <= wider <= self.widest[1]:
                break
            grid = sorted([*grid, wider])
        return grid

    def best_rate(self, results: Results, variant: str, system: str) -> float | None:
        """The fixed rate, or the one with the best mean dev All of the tuning seeds; None while runs are missing."""
        if self.systems[system].rate is not None:
            return self.systems[system].rate
        system = self.systems[system].like or system
        return self._best_of(results, variant, system, self.rates(results, variant, system))

    def evaluation(self, results: Results, variant: str, system: str) -> list[Run]:
        """The runs of the evaluation seeds; none while the rate is not known."""
        rate = self.best_rate(results, variant, system)
        return [] if rate is None else [Run(variant, system, rate, seed) for seed in range(self.systems[system].seeds)]

    def _best_of(self, results: Results, variant: str, system: str, grid: Iterable[float]) -> float | None:
        means: dict[float, float] = {}
        for rate in grid:
            runs = self._tuning(variant, system, [rate])
            if any(run not in results for run in runs):
                return None
            means[rate] = fmean(sum(results[run].dev.values()) for run in runs)
        return max(means, key=lambda rate: means[rate])

    def _tuning(self, variant: str, system: str, rates: Iterable[float]) -> list[Run]:
        return [Run(variant, system, rate, seed) for rate in rates for seed in self.tuning_seeds]
