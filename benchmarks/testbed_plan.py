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
    widest=WIDEST,
)
QUICK = Plan(
    {system: replace(_SYSTEMS[system], seeds=2) for system in MAIN},
    tuple(("conflict", system) for system in MAIN),
    grid=(2e-3,),
    tuning_seeds=(100,),
)
"""The main contrast in a few minutes."""
