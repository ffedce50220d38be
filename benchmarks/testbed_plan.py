"""The runs of the testbed, and the next ones to do, given the results so far.

Every system is tuned on the same grid of learning rates and tuning seeds; the grid is widened while the best rate is at
its end. Systems are then compared on evaluation seeds at their best rates, in pairs with the same seed and data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

WIDEST = (6e-5, 3.2e-2)
"""Bounds of the learning rates."""
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
    """

    settings: Mapping[str, Any]
    seeds: int = 5
    like: str | None = None
    rate: float | None = None
    task: str | None = None

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
    """Final F1 of a run by dataset task in percent, on dev and on test."""

    dev: Mapping[str, float]
    test: Mapping[str, float]
    seconds: float = field(default=0.0, compare=False)


Results = Mapping[Run, Result]


@dataclass(frozen=True)
class Plan:
    """All runs of the testbed.

    Args:
        systems: systems by name
        order: (variant, system) in the order in which they are trained
        grid: learning rates for tuning
        tuning_seeds: seeds for tuning, which are not evaluation seeds
    """

    systems: Mapping[str, System]
    order: tuple[tuple[str, str], ...]
    grid: tuple[float, ...]
    tuning_seeds: tuple[int, ...]

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
        grid = list(self.grid)
        while len(grid) > 1 and (best := self._best_of(results, variant, system, grid)) in (grid[0], grid[-1]):
            wider = best / 2 if best == grid[0] else best * 2
            if not WIDEST[0] <= wider <= WIDEST[1]:
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


def _adapter(method: str, rank: int, experts: int = 1, **settings: Any) -> dict[str, Any]:
    """Settings of an adapter whose experts start at the scale of LoRA with alpha = 2 r.

    Args:
        experts: number of experts among which the gate starts evenly, which divides the scale of each
    """
    return {"adapter": method, "lora_rank": rank, "lora_alpha": 2 * experts * rank, **settings}


# Adapters have equal trained parameters, which a test counts: C-LoRAE's universal expert of rank 24, three task experts
# of rank 8, gate and two MIM vectors have as many as LoRA of rank 50 on square layers.
_LORA_2R = _adapter("lora", 50)
_OTHER_RATE = "LoRA, 2r, at 0.002"
_SYSTEMS = {
    "C-LoRAE": System(_adapter("clorae", 24, 2), seeds=12),
    "LoRA, 2r": System(_LORA_2R, seeds=12),
    _OTHER_RATE: System(_LORA_2R, seeds=12, rate=2e-3),
    "only universal": System(_adapter("clorae", 50, use_experts=False)),
    "only task experts": System(_adapter("clorae", 50, use_universal=False)),
    "no gate": System(_adapter("clorae", 25, use_gate=False)),
    "no MIM": System(_adapter("clorae", 25, 2, beta=0.0)),
    "no achievement": System(_adapter("clorae", 24, 2, loss_weighting="none")),
    "LoRA, r": System(_adapter("lora", 24)),
    "MoSLoRA": System(_adapter("moslora", 43)),
    "LoRAMoE": System(_adapter("loramoe", 24, 6)),
    "MTL-LoRA": System(_adapter("mtllora", 22)),
    "HydraLoRA": System(_adapter("hydralora", 24, 3)),
    "CoBa": System(_adapter("clorae", 24, 2, loss_weighting="coba")),
    "full": System({"adapter": "full"}),
    **{f"{task} alone, LoRA, 2r": System(_LORA_2R, 3, "LoRA, 2r", task=task) for task in ("mner", "mre", "mee")},
}
_ABLATIONS = ("only universal", "only task experts", "no gate", "no MIM", "no achievement")
_BASELINES = [system for system in _SYSTEMS if system not in (*MAIN, _OTHER_RATE, *_ABLATIONS)]
FULL = Plan(
    _SYSTEMS,
    (
        *((variant, system) for variant in ("conflict", "control") for system in MAIN),
        ("control", _OTHER_RATE),  # two tuning seeds gave 412.5 at 1e-3 and 411.5 at 2e-3
        *((variant, system) for variant in ("conflict", "control") for system in _ABLATIONS),
        *(("conflict", system) for system in _BASELINES),
    ),
    grid=(5e-4, 1e-3, 2e-3, 4e-3),
    tuning_seeds=(100, 101),
)
_NEWEST = (*MAIN, "MTL-LoRA", "HydraLoRA", "CoBa")
QUICK = Plan(
    {system: replace(_SYSTEMS[system], seeds=2) for system in _NEWEST},
    tuple(("conflict", system) for system in _NEWEST),
    grid=(2e-3,),
    tuning_seeds=(100,),
)
"""The main contrast and the later baselines in a few minutes."""
