"""The trained weights and their optimizer state, whole, out of wherever ZeRO keeps them and back.

What is trained is small, so it is gathered weight by weight: nothing in it depends on the number of ranks or the ZeRO
stage. A weight ``NAME`` gives the tensors ``NAME`` (its fp32 master copy) and ``NAME|exp_avg``, ``NAME|exp_avg_sq`` (or
whatever the optimizer keeps as large as the weight).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from lvlm_clorae.training import distributed

SEPARATOR = "|"
# Where the fp32 partitions lie: ZeRO-3, ZeRO-1 and ZeRO-2, DeepSpeed's BF16_Optimizer.
_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def trained_shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of each trained weight."""
    return {name: list(getattr(weight, "ds_shape", weight.shape)) for name, weight in _trained(model)}


def gather(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, one after another, each whole on every rank. Collective; after the first optimizer step.

    Yields:
        name and an fp32 tensor in the weight's shape
    """
    moments, _ = _state_names(engine)
    for name, weight in _trained(engine.module):
        yield name, safe_get_full_fp32_param(weight)
        for key in moments:
            yield name + SEPARATOR + key, safe_get_full_optimizer_state(weight, key)


def counters(engine: Any) -> dict[str, float]:
    """What the optimizer counts for all weights alike: Adam's ``step``."""
    _, numbers = _state_names(engine)
    return numbers


def restore(engine: Any, read: Callable[[str], torch.Tensor], numbers: dict[str, float]) -> None:
    """Put back what :func:`gather` and :func:`counters` gave, on any number of ranks and under any stage. Collective.

    Args:
        read: gives the tensor of a name, whole
        numbers: of :func:`counters`
    """
    _make_state(engine, numbers)
    moments, _ = _state_names(engine)
    for name, weight in _trained(engine.module):
        value = read(name)
        _set(weight, value, None)
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):  # what the forward computes with
            if weight.numel():
                weight.data.copy_(value.view_as(weight))
        for key in moments:
            _set(weight, read(name + SEPARATOR + key), key)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _partitions(engine: Any) -> list[torch.Tensor]:
    """The flat fp32 master copies that this rank steps."""
    return list(next(getattr(engine.optimizer, name) for name in _PARTITIONS if hasattr(engine.optimizer, name)))


def _state_names(engine: Any) -> tuple[list[str], dict[str, float]]:
    """The names of what the optimizer keeps as large as the weights, and the numbers beside it."""
    partition = _partitions(engine)[0]
    state = engine.basic_optimizer.state[partition]
    large = {key for key, value in state.items() if torch.is_tensor(value) and value.shape == partition.shape}
    numbers = {key: value for key, value in state.items() if key not in large and value is not None}
    return sorted(large), {key: float(value) for key, value in numbers.items()}


def _make_state(engine: Any, numbers: dict[str, float]) -> None:
    """Let the optimizer make its state in its own way, by a step of nothing; then set what it counts."""
    optimizer = engine.basic_optimizer
    groups = optimizer.param_groups
    before = [(group["params"], group["lr"]) for group in groups]
    partitions = _partitions(engine)
    given = [partition.grad for partition in partitions]  # under offload a buffer, which stays
    for partition in partitions:
        partition.grad = torch.zeros_like(partition)
    for group in groups:
        group.update(params=[], lr=0.0)
    groups[0]["params"] = partitions
    optimizer.step()
    for group, (params, rate) in zip(groups, before, strict=True):
        group.update(params=params, lr=rate)
    for partition, grad in zip(partitions, given, strict=True):
        partition.grad = grad
        state = optimizer.state[partition]
        for key, value in numbers.items():
            state[key] = state[key].fill_(value) if torch.is_tensor(state[key]) else type(state[key])(value)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # which waits for the first step
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set(weight: Any, value: torch.Tensor, key: str | None) -> None:
    """Put this rank's part of ``value`` into the master copy, or into what the optimizer keeps under ``key``."""
    if hasattr(weight, "ds_id"):
        # By the part: DeepSpeed's way for whole values breaks where the ranks do not divide the weight evenly.
        size = weight.ds_tensor.numel()
        whole = value.new_zeros(size * distributed.world_size())
        whole[: value.numel()] = value.flatten()
        part = whole.narrow(0, size * distributed.rank(), size)
        if key is None:
            safe_set_local_fp32_param(weight, part)
        else:
            safe_set_local_optimizer_state(weight, part, key)
    elif key is None:
        safe_set_full_fp32_param(weight, value)
    else:
        safe_set_full_optimizer_state(weight, value, key)
