"""What runs are called beside one another: their system, in the paper's words, and the settings they differ in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvlm_clorae.sweep.collect import spelt
from lvlm_clorae.training.config import TrainConfig, make_config
from lvlm_clorae.training.run_directory import MAY_CHANGE

SYSTEMS = {
    "clorae": "C-LoRAE",
    "lora": "LoRA",
    "moslora": "MoSLoRA",
    "loramoe": "LoRAMoE",
    "full": "full fine-tuning",
    "none": "base alone",
}
"""The value of ``adapter`` and what tables call it."""
UMIE = "UMIE"
"""Full fine-tuning with UMIE's fusion."""
ABLATIONS = {
    "use_experts": "only universal",
    "use_universal": "only task experts",
    "use_gate": "no gate",
    "beta": "no MIM",
    "achievement": "no achievement loss",
}
"""A switch of C-LoRAE and what tables call a run that has it off (Table 3 of the paper)."""

_BATCH = {"micro_batch", "accumulation", "block"}  # may change with the ranks, of which a configuration knows nothing
UNDECIDING = (MAY_CHANGE - _BATCH) | {"seed"}
"""Settings in which repetitions of one run may differ."""


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings that repetitions of a run have in common."""
    return {name: value for name, value in vars(config).items() if name not in UNDECIDING}


def system(config: TrainConfig) -> str:
    """What a run trains, in a word."""
    return UMIE if (config.adapter, config.fusion) == ("full", "gated") else SYSTEMS[config.adapter]


def usual(config: TrainConfig) -> TrainConfig:
    """The run's system on its base, with the base's recipe; the achievement loss is C-LoRAE's alone."""
    return make_config(
        {
            "model": config.model,
            "adapter": config.adapter,
            "fusion": "gated" if system(config) == UMIE else "concat",
            "achievement": config.adapter == "clorae",
        }
    )


def deviations(config: TrainConfig, ordinary: TrainConfig) -> dict[str, Any]:
    """The deciding settings that are not as in ``ordinary``, ablations aside."""
    off = set(ablations(config))
    return {
        name: value
        for name, value in deciding(config).items()
        if value != getattr(ordinary, name) and ABLATIONS.get(name) not in off
    }


def ablations(config: TrainConfig) -> list[str]:
    """The names of the ablations of a run of C-LoRAE."""
    if config.adapter != "clorae":
        return []
    return [word for name, word in ABLATIONS.items() if not getattr(config, name)]


def names(configs: Sequence[TrainConfig]) -> list[str]:
    """A name for each of these runs: system, base where these differ, ablations, and the settings in which the runs
    differ and that are not the system's usual ones. Names may be equal, as where one value is spelt as another.
    """
    settings = [deciding(config) for config in configs]
    varied = {name for name in settings[0] if any(other[name] != settings[0][name] for other in settings)}
    found = []
    for config in configs:
        base = f" {Path(config.model).name}" if "model" in varied else ""
        others = deviations(config, usual(config))
        words = [f"{name}={spelt(value)}" for name, value in others.items() if name in varied]
        found.append(", ".join([system(config) + base, *ablations(config), *words]))
    return found
