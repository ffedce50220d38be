"""What ``--adapter`` trains, and the loss that an adapter method adds to the cross-entropy."""

from __future__ import annotations

from typing import Any

import peft
from torch import Tensor

from lvlm_clorae import CLoRAEConfig, LoRAMoEConfig, MoSLoRAConfig
from lvlm_clorae.training import distributed
from lvlm_clorae.training.config import TrainConfig

SIDE_LOSSES = {"clorae": "mim", "loramoe": "balance"}
"""Methods that have a loss of their own and know tasks, and what it is called in the metrics."""


def add_adapter(model: Any, config: TrainConfig, tasks: list[str]) -> Any:
    """The model with what ``config.adapter`` trains: a PEFT model, or for full and none itself."""
    if config.adapter in ("full", "none"):
        model.requires_grad_(config.adapter == "full")
        model.vision_tower.requires_grad_(False)
        return model
    return peft.get_peft_model(model, adapter_config(config, tasks))


def adapter_config(config: TrainConfig, tasks: list[str]) -> peft.PeftConfig:
    """The configuration of the run's PEFT method."""
    common: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha if config.alpha is not None else config.rank,
        "lora_dropout": config.dropout,
        # PEFT's own table knows T5 by its model type; ours is a subclass of it.
        "target_modules": config.target_modules or ["q", "v"],
        "exclude_modules": r".*(vision_tower|projector)\..*",
        "modules_to_save": ["projector"] if config.train_projector else None,
    }
    if config.adapter == "lora":
        return peft.LoraConfig(**common)
    if config.adapter == "moslora":
        return MoSLoRAConfig(**common)
    if config.adapter == "loramoe":
        return LoRAMoEConfig(**common, tasks=tasks, expert_r=config.expert_rank, use_balance=config.beta > 0)
    return CLoRAEConfig(
        **common,
        tasks=tasks,
        expert_r=config.expert_rank,
        use_universal=config.use_universal,
        use_experts=config.use_experts,
        use_gate=config.use_gate,
        use_mim=config.beta > 0,
    )


def side_loss(model: Any) -> Tensor:
    """The adapter's own loss for the tokens of all ranks together: MIM of C-LoRAE, balance of LoRAMoE. Collective."""
    ranks = distributed.world_size()
    if hasattr(model, "balance_loss"):
        return model.balance_loss(distributed.sum_over_ranks, ranks)
    return model.mutual_information_loss(lambda counts: distributed.sum_over_ranks(counts) / ranks)
