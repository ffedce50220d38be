"""Gather and restore trained weights and their optimizer state under any ZeRO stage.

A weight ``NAME`` gives the tensors ``NAME`` (its fp32 master copy) and ``NAME|exp_avg``, ``NAME|exp_avg_sq`` (or what
else the optimizer keeps in the weight's shape). They do not depend on the number of ranks or the ZeRO stage.
"""

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import utils
from torch import nn

from lvlm_clorae.training import distributed

SEPARATOR = "|"
# Attributes with the fp32 partitions in ZeRO-3, in ZeRO-1 and ZeRO-2, and in DeepSpeed's BF16_Optimizer.
_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def trained_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shape of each trained weight."""
    return {name: list(getattr(weight, "ds_shape", weight.shape)) for name, weight in _trained(model)}


def gather(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and whole fp32 tensor of each weight and moment, after the first optimizer step. Collective."""
    moments, _ = _state_names(engine)
    for name, weight in _trained(engine.module):
        yield name, utils.safe_get_full_fp32_param(weight)
        for key in moments:
            yield name + SEPARATOR + key, utils.safe_get_full_optimizer_state(weight, key)


def counters(engine: Any) -> dict[str, float]:
    """Return the optimizer's scalar state, such as Adam's ``step``."""
    return _state_names(engine)[1]


def restore(engine: Any, read: Callable[[str], torch.Tensor], scalars: dict[str, float]) -> None:
    """Restore the tensors of :func:`gather`, returned by ``read``, and the scalars of :func:`counters`. Collective."""
    _create_state(engine, scalars)
    moments, _ = _state_names(engine)
    for name, weight in _trained(engine.module):
        value = read(name)
        _set(weight, value, None)
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):  # the copy that the forward reads
            if weight.numel():
                weight.data.copy_(value.view_as(weight))
        for key in moments:
            _set(weight, read(name + SEPARATOR + key), key)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _partitions(engine: Any) -> list[torch.Tensor]:
    """Return the flat fp32 master copies that this rank updates."""
    return list(next(getattr(engine.optimizer, name) for name in _PARTITIONS if hasattr(engine.optimizer, name)))


def _state_names(engine: Any) -> tuple[list[str], dict[str, float]]:
    """Return the names of the optimizer's tensors in the weights' shape, and its scalars."""
    partition = _partitions(engine)[0]
    state = engine.basic_optimizer.state[partition]
    tensors = {key for key, value in state.items() if torch.is_tensor(value) and value.shape == partition.shape}
    scalars = {key: value for key, value in state.items() if key not in tensors and value is not None}
    return sorted(tensors), {key: float(value) for key, value in scalars.items()}


def _create_state(engine: Any, scalars: dict[str, float]) -> None:
    """Create the optimizer's state by a zero-gradient step with learning rate 0, then set its scalars."""
    optimizer = engine.basic_optimizer
    groups = optimizer.param_groups
    before = [(group["params"], group["lr"]) for group in groups]
    partitions = _partitions(engine)
    gradients = [partition.grad for partition in partitions]  # with offloading a buffer, which must stay
    for partition in partitions:
        partition.grad = torch.zeros_like(partition)
    for group in groups:
        group.update(params=[], lr=0.0)
    groups[0]["params"] = partitions
    optimizer.step()
    for group, (params, rate) in zip(groups, before, strict=True):
        group.update(params=params, lr=rate)
    for partition, gradient in zip(partitions, gradients, strict=True):
        partition.grad = gradient
        state = optimizer.state[partition]
        for key, value in scalars.items():
            state[key] = state[key].fill_(value) if torch.is_tensor(state[key]) else type(state[key])(value)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # otherwise called at the first step
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set(weight: Any, value: torch.Tensor, key: str | None) -> None:
    """Copy this rank's part of ``value`` into the master weight (key None) or into the optimizer's state ``key``."""
    if hasattr(weight, "ds_id"):
        # DeepSpeed's setters of whole values fail if the number of ranks does not divide the weight's size.
        size = weight.ds_tensor.numel()
        whole = value.new_zeros(size * distributed.world_size())
        whole[: value.numel()] = value.flatten()
        part = whole.narrow(0, size * distributed.rank(), size)
        if key is None:
            utils.safe_set_local_fp32_param(weight, part)
        else:
            utils.safe_set_local_optimizer_state(weight, part, key)
    elif key is None:
        utils.safe_set_full_fp32_param(weight, value)
    else:
        utils.safe_set_full_optimizer_state(weight, value, key)
