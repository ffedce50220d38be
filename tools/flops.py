"""Floating-point operations of a micro-batch, by torch's own counter, without weights and without computing.

Blocks of a stack are equal, so stacks of one block and of two are counted and the difference is multiplied. A test
compares this with a count of all blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.models.parts import language_names
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig


@dataclass(frozen=True)
class Cost:
    """Operations of a system on a micro-batch, and its trained parameters."""

    forward: int
    both: int  # forward and backward
    trained: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.both + other.both, self.trained + other.trained)

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, times: int) -> Cost:
        return Cost(times * self.forward, times * self.both, times * self.trained)


class Base:
    """The run's base on the meta device, whose systems are counted on a full micro-batch of the run.

    A row has ``max_source_length`` tokens of text, an image (unless the base is text only) and ``max_target_length``
    tokens of answer. Products are counted, also those of attention; element-wise operations and gradient checkpointing
    are not.

    Raises:
        UserError: as :func:`describe_model`; or the base is not a T5 or causal model with our vision tower
    """

    def __init__(self, config: TrainConfig) -> None:
        model = describe_model(config.model, **config.architecture_options())
        if not (hasattr(model, "vision_tower") and hasattr(model, "projector")):
            raise UserError(
                f"{config.model}: the inputs of this model are not known without its files. Choose a T5 or a causal "
                "language model with a separate vision tower."
            )
        self._batch = _full_batch(model, config)
        self._tower, tower = 0, model.vision_tower
        if tower is not None:
            with counting() as counter:
                tower(self._batch["pixel_values"])
            self._tower = counter.get_total_flops()  # the frozen tower has no backward
            tower.forward = lambda pixels: pixels.new_zeros(len(pixels), tower.grid**2, tower.width)
        self._whole, self._lengths = model, _stacks(model)
        self._short = _shortened(model, dict.fromkeys(self._lengths, 2))

    def count(self, config: TrainConfig, tasks: Sequence[str]) -> Cost:
        """Count the cost of training with ``config.adapter``; stacks of equal length grow together."""
        once = dict.fromkeys(self._lengths, 1)
        one = self._count(_shortened(self._short, once), config, tasks)
        whole = one
        for length in set(self._lengths.values()) - {1}:
            twice = {name: 2 for name, own in self._lengths.items() if own == length}
            two = self._count(_shortened(self._short, {**once, **twice}), config, tasks)
            whole += (two - one) * (length - 1)
        return whole

    def _count(self, model: Any, config: TrainConfig, tasks: Sequence[str]) -> Cost:
        with torch.device("meta"):
            model = add_adapter(model, config, list(tasks)).train()
        tuner: Any = getattr(model, "base_model", None)
        if hasattr(tuner, "set_task"):
            tuner.set_task(tasks[0])
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

        with counting() as counter:
            loss = model(**self._batch).loss
            if hasattr(tuner, "aux_loss"):
                loss = loss + config.beta * tuner.aux_loss()
            forward = counter.get_total_flops()
            if loss.requires_grad:
                # loss.backward() would be a torch function, which runs outside of _OnCPU
                torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss))
        both = counter.get_total_flops()
        return Cost(forward + self._tower, both + self._tower, trained)


def _full_batch(model: Any, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Build rows of the greatest length, without the words of a conversation template."""
    rows, tower = config.per_device_train_batch_size, model.vision_tower
    tokens = config.max_source_length
    if not getattr(model.config, "is_encoder_decoder", False):
        tokens += (tower.grid**2 if tower else 0) + config.max_target_length
    with torch.device("meta"):
        ids = torch.empty(rows, tokens, dtype=torch.long)
        labels = torch.empty(rows, config.max_target_length, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": ids, "labels": labels}
        if tower is not None:
            batch["pixel_values"] = torch.empty(rows, 3, tower.image_size, tower.image_size)
            batch["pixel_mask"] = torch.empty(rows, dtype=torch.long)
        return batch


def _stacks(model: Any) -> dict[str, int]:
    """Name and length of each stack of blocks of the language model."""
    inside = tuple(f"{name}." for name in language_names(model))
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.startswith(inside)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {name: len(model.get_submodule(name)) for name in outer}


def _shortened(model: Any, lengths: dict[str, int]) -> Any:
    """Copy a model with this number of blocks a stack."""
    model = copy.deepcopy(model)
    for name, length in lengths.items():
        del model.get_submodule(name)[length:]
    return model


META = torch.device("meta")
# Products that torch's counter does not know, by the shapes of their arguments
PRODUCTS = {
    torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.mv: lambda a, *_, **__: 2 * a[0] * a[1],
    torch.ops.aten.addr_: lambda a, *_, **__: 2 * a[0] * a[1],
}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count with torch's counter, with attention as plain products, because it knows only some fused ones."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=PRODUCTS)
        with _OnCPU(), sdpa_kernel(SDPBackend.MATH), counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _OnCPU(TorchFunctionMode):
    """Report meta tensors as CPU tensors, because autocast and generators do not support the meta device.

    It is three times as fast as torch's fake tensors. The only value that transformers reads, whether a mask is true
    everywhere, is False.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:
            return torch.device("cpu")
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        args = [META if isinstance(one, torch.device) else one for one in args]
        kwargs = {name: META if isinstance(one, torch.device) else one for name, one in (kwargs or {}).items()}
        return func(*args, **kwargs)
