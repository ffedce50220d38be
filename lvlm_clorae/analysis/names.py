"""Names of runs in tables: system, base, ablations, and the settings in which the runs differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import make_config
from lvlm_clorae.training.run_directory import MAY_CHANGE

ALL = "All"  # column with the sum of the dataset tasks' F1
SYSTEMS = {
    "clorae": "C-LoRAE",
    "lora": "LoRA",
    "moslora": "MoSLoRA",
    "loramoe": "LoRAMoE",
    "mtllora": "MTL-LoRA",
    "hydralora": "HydraLoRA",
    "full": "full fine-tuning",
    "none": "base alone",
}
"""Names in tables by the value of ``adapter``."""
UMIE = "UMIE"  # full fine-tuning with UMIE's fusion
ABLATIONS = {
    "use_experts": "only universal",
    "use_universal": "only task experts",
    "use_gate": "no gate",
    "beta": "no MIM",
    "loss_weighting": "no achievement loss",
}
"""Names in tables by the C-LoRAE setting that is switched off (Table 3 of the paper)."""

# These may change with the number of ranks, which a configuration lacks.
_BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps", "global_micro_batch"}
UNDECIDING = (MAY_CHANGE - _BATCH) | {"seed"}  # settings in which repetitions of one run may differ


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings that repetitions of a run have in common."""
    return {name: value for name, value in vars(config).items() if name not in UNDECIDING}


def system(config: TrainConfig) -> str:
    """Name the system that a run trains."""
    return UMIE if (config.adapter, config.fusion) == ("full", "gated") else SYSTEMS.get(config.adapter, config.adapter)


def recipe_config(model: str, adapter: str, umie: bool = True) -> TrainConfig:
    """The paper's recipe of a system. The achievement loss is on for C-LoRAE only; full fine-tuning is UMIE's."""
    fusion = "gated" if adapter == "full" and umie else "concat"
    weighting = "achievement" if adapter == "clorae" else "none"
    return make_config({"model": model, "adapter": adapter, "fusion": fusion, "loss_weighting": weighting})


def deviations(config: TrainConfig, ordinary: TrainConfig) -> dict[str, Any]:
    """The deciding settings that differ from ``ordinary``, without ablations."""
    off, own = set(ablations(config)), deciding(config).items()
    return {name: x for name, x in own if x != getattr(ordinary, name) and ABLATIONS.get(name) not in off}


def ablations(config: TrainConfig) -> list[str]:
    """Names of the ablations of a C-LoRAE run."""
    if config.adapter != "clorae":
        return []
    return [word for name, word in ABLATIONS.items() if getattr(config, name) in (False, 0.0, "none")]


def names(configs: Sequence[TrainConfig]) -> list[str]:
    """Name runs by system, base where the bases differ, ablations, and unusual settings in which the runs differ.

    Names may be equal, for example if two values read alike.
    """
    settings = [deciding(config) for config in configs]
    varied = {name for name in settings[0] if any(other[name] != settings[0][name] for other in settings)}
    found = []
    for config in configs:
        base = f" {Path(config.model).name}" if "model" in varied else ""
        others = deviations(config, recipe_config(config.model, config.adapter, system(config) == UMIE))
        words = [f"{name}={format_value(value)}" for name, value in others.items() if name in varied]
        found.append(", ".join([system(config) + base, *ablations(config), *words]))
    return found


def format_value(value: Any) -> str:
    """Format a setting's value for a table."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(value) if isinstance(value, list) else str(value)
