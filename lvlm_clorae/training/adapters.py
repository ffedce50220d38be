"""Build the model that ``--adapter`` trains. It imports no DeepSpeed, which describing a model does not need."""

import re
from typing import Any

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from lvlm_clorae.adapters.register import AdapterMethod, adapter_method
from lvlm_clorae.errors import UserError
from lvlm_clorae.models.parts import TOWERS, outside_language, part_of, query_and_value
from lvlm_clorae.training.config import PROJECTOR, WITHOUT_ADAPTER, TrainConfig


def method_of(config: TrainConfig) -> AdapterMethod | None:
    """Return the descriptor of the run's adapter method, None for full and none."""
    return None if config.adapter in WITHOUT_ADAPTER else adapter_method(config.adapter)


def add_adapter(model: Any, config: TrainConfig, tasks: list[str]) -> Any:
    """Return the model with what ``config.adapter`` trains: a PEFT model, or without an adapter the model itself.

    Raises:
        UserError: the method is unknown, or ``target_modules`` or ``train_projector`` do not fit the model.
    """
    method = method_of(config)
    if method is None:
        new = {PROJECTOR, *getattr(model, "newly_initialized", ())} if config.adapter == PROJECTOR else set()
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():  # quantized weights are integers
                in_full = config.adapter == "full" and not re.fullmatch(TOWERS, name)
                parameter.requires_grad_(in_full or part_of(name) in new)
        return model
    return peft.get_peft_model(model, method.make_config(_common_fields(model, config), config, tasks))


def _common_fields(model: Any, config: TrainConfig) -> dict[str, Any]:
    """Return the configuration fields that all methods share, for the language model of ``model``."""
    targets: list[str] | str = config.target_modules or query_and_value(model)
    excluded = outside_language(model)
    check_targets(model, config.target_modules)
    in_full = list(getattr(model, "newly_initialized", ()))
    if "projector" in in_full and not config.train_projector:
        raise UserError(f"{config.model} has no projector, so a random one would be used. Leave train_projector on.")
    if getattr(model, "projector", None) is not None and config.train_projector:
        in_full = list(dict.fromkeys(["projector", *in_full]))
    return {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "exclude_modules": excluded,
        "modules_to_save": in_full or None,
    }


def check_targets(model: Any, targets: list[str]) -> None:
    """Raise UserError unless each target is a linear layer; PEFT ignores those without a match if others have one."""
    if targets in ([], ["all-linear"]):
        return
    excluded = outside_language(model)
    linear = [f".{name}" for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    linear = [name for name in linear if not re.fullmatch(excluded, name[1:])]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in linear):
            names = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f'target_modules: the language model has no linear layer "{target[:60]}". '
                f"Choose from {', '.join(names)}, or all-linear."
            )
