"""Which runs the testbed consists of, and which of them are to be done next, given the results so far.

Every system gets the same grid of learning rates on tuning seeds, widened while its best rate is an end of it; the
verdict is of fresh seeds at the best rate. A seed draws the data too, so systems are compared in pairs on the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

WIDEST = (6e-5, 3.2e-2)
"""Rates beyond which no grid is widened."""
MAIN = ("C-LoRAE", "LoRA, 2r")
"""The main contrast: the first is to be better."""


@dataclass(frozen=True)
class System:
    """What is trained.

    Args:
        settings: of the run, beside those that all have
        seeds: fresh ones, from 0
        like: the system whose rate is taken over, where it has no tuning of its own
        rate: the only one, where there is nothing to tune
        task: the only task that is trained
    """

    settings: Mapping[str, Any]
    seeds: int = 5
    like: str | None = None
    rate: float | None = None
    task: str | None = None

    @property
    def tuned(self) -> bool:
        """Has a tuning of its own."""
        return self.like is None and self.rate is None


@dataclass(frozen=True)
class Run:
    """One run; ``name`` is that of its directory."""

    variant: str
    system: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        words = "".join(letter if letter.isalnum() else " " for letter in self.system.lower()).split()
        return f"{self.variant}_{'-'.join(words)}_{self.rate:g}_{self.seed}"


@dataclass(frozen=True)
class Result:
    """What a run scored at its end: F1 by unit in percent, on dev and on test."""

    dev: Mapping[str, float]
    test: Mapping[str, float]
    seconds: float = field(default=0.0, compare=False)


Results = Mapping[Run, Result]


@dataclass(frozen=True)
class Plan:
    """All runs.

    Args:
        systems: by name
        order: (variant, system) in the order in which they are done
        grid: learning rates that every system is tuned on
        tuning_seeds: seeds of the tuning, none of which tells the verdict
    """

    systems: Mapping[str, System]
    order: tuple[tuple[str, str], ...]
    grid: tuple[float, ...]
    tuning_seeds: tuple[int, ...]

    def missing(self, results: Results) -> list[Run]:
        """The runs that can be told to be needed and are not done."""
        wanted: list[Run] = []
        for variant, system in self.order:
            if self.systems[system].tuned:
                wanted += self._tuning(variant, system, self.rates(results, variant, system))
            wanted += self.verdict(results, variant, system)
        return [run for run in wanted if run not in results]

    def rates(self, results: Results, variant: str, system: str) -> list[float]:
        """The grid, widened on the side where the best of it lies at its end; a single rate stays one."""
        grid = list(self.grid)
        while len(grid) > 1 and (best := self._best_of(results, variant, system, grid)) in (grid[0], grid[-1]):
            wider = best / 2 if best == grid[0] else best * 2
            if not WIDEST[0] <= wider <= WIDEST[1]:
                break
            grid = sorted([*grid, wider])
        return grid

    def best_rate(self, results: Results, variant: str, system: str) -> float | None:
        """The only rate, or that with the best All on dev over the tuning seeds; None while it is not known."""
        if self.systems[system].rate is not None:
            return self.systems[system].rate
        system = self.systems[system].like or system
        return self._best_of(results, variant, system, self.rates(results, variant, system))

    def verdict(self, results: Results, variant: str, system: str) -> list[Run]:
        """The runs of the fresh seeds; none while the rate is not known."""
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
    """An adapter whose experts each begin at the scale of LoRA with alpha = 2 r.

    Args:
        experts: among which a gate begins by sharing evenly, which divides the scale of each
    """
    return {"adapter": method, "rank": rank, "alpha": 2 * experts * rank, **settings}


# Adapters of equal trained parameters: C-LoRAE's universal expert of 24, its three task experts of 8, the gate and the
# two vectors of MIM are together as many as LoRA's of rank 50 on square layers. A test counts them.
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
    "no achievement": System(_adapter("clorae", 24, 2, achievement=False)),
    "LoRA, r": System(_adapter("lora", 24)),
    "MoSLoRA": System(_adapter("moslora", 43)),
    "LoRAMoE": System(_adapter("loramoe", 24, 6)),
    "full": System({"adapter": "full"}),
    **{f"{task} alone, LoRA, 2r": System(_LORA_2R, 3, "LoRA, 2r", task=task) for task in ("mner", "mre", "mee")},
}
_ABLATIONS = ("only universal", "only task experts", "no gate", "no MIM", "no achievement")
_RIVALS = [system for system in _SYSTEMS if system not in (*MAIN, _OTHER_RATE, *_ABLATIONS)]
FULL = Plan(
    _SYSTEMS,
    (
        *((variant, system) for variant in ("conflict", "control") for system in MAIN),
        ("control", _OTHER_RATE),  # where two tuning seeds gave 412.5 at 1e-3 and 411.5 at 2e-3
        *((variant, system) for variant in ("conflict", "control") for system in _ABLATIONS),
        *(("conflict", system) for system in _RIVALS),
    ),
    grid=(5e-4, 1e-3, 2e-3, 4e-3),
    tuning_seeds=(100, 101),
)
QUICK = Plan(
    {system: replace(_SYSTEMS[system], seeds=2) for system in MAIN},
    tuple(("conflict", system) for system in MAIN),
    grid=(2e-3,),
    tuning_seeds=(100,),
)
"""A look at the main contrast."""
_DRAWN = {
    "C-LoRAE": System(_SYSTEMS["C-LoRAE"].settings, seeds=12, rate=2e-3),
    "MIM of 12 tokens": System(_adapter("clorae", 24, 2, mim_tokens=12), seeds=12, rate=2e-3),
}
DRAWN = Plan(
    _DRAWN, tuple((variant, system) for variant in ("conflict", "control") for system in _DRAWN), (2e-3,), (100, 101)
)
"""What it does to take the MIM term from few tokens, as the presets of FLAN-T5 and LLaVA do and those runs do not."""
