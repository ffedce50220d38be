"""What ``--adapter`` trains, and the loss that an adapter method adds to the cross-entropy."""

from __future__ import annotations

import re
from typing import Any

import peft
from torch import Tensor

from lvlm_clorae import CLoRAEConfig, LoRAMoEConfig, MoSLoRAConfig
from lvlm_clorae.errors import UserError
from lvlm_clorae.models.parts import TOWERS, outside_language, query_and_value
from lvlm_clorae.training.config import TrainConfig

SIDE_LOSSES = {"clorae": "mim", "loramoe": "balance"}
"""Methods that have a loss of their own and know tasks, and what it is called in the metrics."""


def add_adapter(model: Any, config: TrainConfig, tasks: list[str]) -> Any:
    """The model with what ``config.adapter`` trains: a PEFT model, or for full and none itself.

    Raises:
        UserError: ``target_modules`` or ``train_projector`` do not suit the model.
    """
    if config.adapter in ("full", "none"):
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():  # quantised weights are whole numbers
                parameter.requires_grad_(config.adapter == "full" and not re.fullmatch(TOWERS, name))
        return model
    return peft.get_peft_model(model, adapter_config(model, config, tasks))


def adapter_config(model: Any, config: TrainConfig, tasks: list[str]) -> peft.PeftConfig:
    """The configuration of the run's PEFT method on the language model of ``model``."""
    targets: list[str] | str = config.target_modules or query_and_value(model)
    common: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "exclude_modules": outside_language(model),
        "modules_to_save": _trained_whole(model, config) or None,
    }
    if config.adapter == "lora":
        return peft.LoraConfig(**{**common, "lora_alpha": config.alpha or 2 * config.rank})
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
        mim_tokens=config.mim_tokens,
    )


def _trained_whole(model: Any, config: TrainConfig) -> list[str]:
    """The parts beside the adapter that are trained: fresh ones, and our projector where the run says so."""
    fresh = list(getattr(model, "fresh_parts", ()))
    if "projector" in fresh and not config.train_projector:
        raise UserError(
            f"train_projector is off, but {config.model} brings no projector: it would stay random. Leave it on."
        )
    own = hasattr(model, "projector") and config.train_projector
    return list(dict.fromkeys([*(["projector"] if own else []), *fresh]))


def side_loss(model: Any) -> Tensor:
    """The adapter's own loss for the tokens of all ranks together: MIM of C-LoRAE, balance of LoRAMoE. Collective."""
    from lvlm_clorae.training import distributed  # with DeepSpeed, which describing a model does not need

    ranks = distributed.world_size()
    if hasattr(model, "balance_loss"):
        return model.balance_loss(distributed.sum_over_ranks, ranks)
    return model.mutual_information_loss(lambda counts: distributed.sum_over_ranks(counts) / ranks)
