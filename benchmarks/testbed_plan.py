"""The runs of the testbed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plan import MAIN, Plan, System

WIDEST = (6e-5, 3.2e-2)
"""Bounds of the learning rates."""


def _adapter(method: str, rank: int, experts: int = 1, **settings: Any) -> dict[str, Any]:
    """Settings of an adapter whose experts start at the scale of LoRA with alpha = 2 r.

    Args:
        experts: number of experts among which the gate starts evenly, which divides the scale of each
    """
    return {"adapter": method, "lora_rank": rank, "lora_alpha": 2 * experts * rank, **settings}


# Adapters have equal trained parameters, which a test counts: C-LoRAE's universal expert of rank 24, three task experts
# of rank 8, gate and two MIM vectors have as many as LoRA of rank 50 on square layers.
_CLORAE = _adapter("clorae", 24, 2)
_LORA_2R = _adapter("lora", 50)
_NO_MIM = _adapter("clorae", 25, 2, beta=0.0)
_BETAS = {"no MIM": _NO_MIM, **{f"beta {beta:g}": _CLORAE | {"beta": beta} for beta in (1e-4, 1e-3, 0.1)}}
_ABLATIONS = {
    "no gate": _adapter("clorae", 25, use_gate=False),
    "only task experts": _adapter("clorae", 50, use_universal=False),
}
_WEIGHTINGS = {
    "no achievement": {"loss_weighting": "none"},
    "CoBa": {"loss_weighting": "coba"},
    "achievement, sum": {"normalize": "sum"},
    "achievement, sum, gamma 4": {"normalize": "sum", "gamma": 4.0},
}
_BASELINES = {
    "LoRAMoE": _adapter("loramoe", 24, 6),
    "MTL-LoRA": _adapter("mtllora", 22),
    "HydraLoRA": _adapter("hydralora", 24, 3),
    "LoRA, 2r, alpha 4r": _adapter("lora", 50, 2),
    "MoSLoRA": _adapter("moslora", 43),
    "full": {"adapter": "full"},
}
_ALONE = {f"{task} alone, LoRA, 2r": System(_LORA_2R, 3, MAIN[1], task=task) for task in ("mner", "mre", "mee")}
_SYSTEMS = {
    MAIN[0]: System(_CLORAE, seeds=12),
    MAIN[1]: System(_LORA_2R, seeds=12),
    **{name: System(found, 12, MAIN[0]) for name, found in (_BETAS | _ABLATIONS).items()},
    **{name: System(_CLORAE | found, 8, MAIN[0]) for name, found in _WEIGHTINGS.items()},
    **{name: System(found) for name, found in _BASELINES.items()},
    **_ALONE,
}
_BOTH = ("conflict", "control")
FULL = Plan(
    _SYSTEMS,
    (
        *((variant, system) for variant in _BOTH for system in MAIN),
        *((variant, system) for system in _BETAS for variant in _BOTH),
        *((variant, system) for system in _ABLATIONS for variant in _BOTH),
        *(("conflict", system) for system in ("LoRAMoE", "MTL-LoRA", "HydraLoRA")),
        *(("unequal", system) for system in (MAIN[0], *_WEIGHTINGS)),
        *(("conflict", system) for system in ("no achievement", "CoBa")),
        *((variant, "LoRA, 2r, alpha 4r") for variant in _BOTH),
        *(("conflict", system) for system in ("MoSLoRA", "full", *_ALONE)),
    ),
    grid=(1e-3, 2e-3, 4e-3),
    tuning_seeds=(100, 101),
    widest=WIDEST,
)
QUICK = Plan(
    {system: replace(_SYSTEMS[system], seeds=2) for system in MAIN},
    tuple(("conflict", system) for system in MAIN),
    grid=(2e-3,),
    tuning_seeds=(100,),
)
"""The main contrast in a few minutes."""
