"""Floating-point operations of a micro-batch, by torch's own counter, without weights and without computing.

A stack of blocks repeats itself, so stacks of one block and of two are counted and the rest is as many times the
difference; what is trained is counted the same way. A test holds this to a count of all blocks.
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
from lvlm_clorae.training.adapters import SIDE_LOSSES, add_adapter
from lvlm_clorae.training.config import CHOICES, TrainConfig


@dataclass(frozen=True)
class Cost:
    """What a system costs on a micro-batch.

    Args:
        forward: operations
        both: of forward and backward
        trained: parameters
    """

    forward: int
    both: int
    trained: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.both + other.both, self.trained + other.trained)

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, times: int) -> Cost:
        return Cost(times * self.forward, times * self.both, times * self.trained)


class Base:
    """The run's base on the meta device, whose systems are counted on a full micro-batch of the run.

    A row has ``max_length`` tokens of text, a picture and ``max_answer_length`` tokens of answer. Products are counted,
    attention's own among them, element-wise work is not. Nothing is recomputed for gradient checkpointing.

    Raises:
        UserError: as :func:`describe_model`; or a base that is none of ours, whose inputs are known here.
    """

    def __init__(self, config: TrainConfig) -> None:
        model = describe_model(config.model, **{name: getattr(config, name) for name in CHOICES})
        if not (hasattr(model, "vision_tower") and hasattr(model, "projector")):
            raise UserError(
                f"{config.model}: operations are counted of a T5 or a causal language model with our vision tower. The "
                "inputs of other models are not known before their files are read."
            )
        self._batch = _full_batch(model, config)
        self._tower = _count_tower(model.vision_tower, self._batch["pixel_values"])
        model.vision_tower = _Blank(model.vision_tower)
        self._whole, self._lengths = model, _stacks(model)
        self._short = _shortened(model, dict.fromkeys(self._lengths, 2))

    def count(self, config: TrainConfig, tasks: Sequence[str]) -> Cost:
        """The cost of what ``config.adapter`` trains; stacks of one length grow together."""
        once = dict.fromkeys(self._lengths, 1)
        one = self._count(_shortened(self._short, once), config, tasks)
        whole = one
        for length in set(self._lengths.values()) - {1}:
            twice = {name: 2 for name, own in self._lengths.items() if own == length}
            two = self._count(_shortened(self._short, {**once, **twice}), config, tasks)
            whole += (two - one) * (length - 1)
        return whole

    def count_whole(self, config: TrainConfig, tasks: Sequence[str]) -> Cost:
        """The same of all blocks, one by one: what :meth:`count` is held to."""
        return self._count(copy.deepcopy(self._whole), config, tasks)

    def _count(self, model: Any, config: TrainConfig, tasks: Sequence[str]) -> Cost:
        with torch.device("meta"):
            model = add_adapter(model, config, list(tasks)).train()
        if config.adapter in SIDE_LOSSES:
            model.set_task(tasks[0])
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

        with counting() as counter:
            loss = model(**self._batch).loss
            if config.adapter in SIDE_LOSSES:
                own = model.mutual_information_loss if config.adapter == "clorae" else model.balance_loss
                loss = loss + config.beta * own()
            forward = counter.get_total_flops()
            if loss.requires_grad:
                # Of a tensor it would be a function of torch's, and those run outside of _OnCPU
                torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss))
        both = counter.get_total_flops()
        return Cost(forward + self._tower, both + self._tower, trained)


def _count_tower(tower: Any, pixels: torch.Tensor) -> int:
    """Operations of the frozen tower, which has no backward."""
    with counting() as counter:
        tower(pixels)
    return counter.get_total_flops()


class _Blank(nn.Module):
    """In a tower's place: its shapes alone."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.image_size, self.width, self.grid = tower.image_size, tower.width, tower.grid

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches ``[I, P, width]``."""
        return pixel_values.new_zeros(len(pixel_values), self.grid**2, self.width)


def _full_batch(model: Any, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Rows as the processor makes them, as long as they may be; but for the words of a conversation's template."""
    rows, tower = config.micro_batch, model.vision_tower
    tokens = config.max_length
    if not getattr(model.config, "is_encoder_decoder", False):
        tokens += tower.grid**2 + config.max_answer_length
    with torch.device("meta"):
        ids = torch.empty(rows, tokens, dtype=torch.long)
        return {
            "input_ids": ids,
            "attention_mask": ids,
            "pixel_values": torch.empty(rows, 3, tower.image_size, tower.image_size),
            "pixel_mask": torch.empty(rows, dtype=torch.long),
            "labels": torch.empty(rows, config.max_answer_length, dtype=torch.long),
        }


def _stacks(model: Any) -> dict[str, int]:
    """The language model's stacks of blocks and how many each has."""
    inside = tuple(f"{name}." for name in language_names(model))
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.startswith(inside)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {name: len(model.get_submodule(name)) for name in outer}


def _shortened(model: Any, lengths: dict[str, int]) -> Any:
    """A copy with so many blocks."""
    model = copy.deepcopy(model)
    for name, length in lengths.items():
        del model.get_submodule(name)[length:]
    return model


def _outer_product_added(a: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1]


def _product_added(_: Sequence[int], a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


META = torch.device("meta")
PRODUCTS = {
    torch.ops.aten.addmm_: _product_added,
    torch.ops.aten.mv: _outer_product_added,
    torch.ops.aten.addr_: _outer_product_added,
}
"""Products that torch's counter does not know."""


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """torch's counter, with attention as plain products: of fused ones it knows some only."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=PRODUCTS)
        with _OnCPU(), sdpa_kernel(SDPBackend.MATH), counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _OnCPU(TorchFunctionMode):
    """Tensors of the meta device say that they are on the CPU, since autocast and generators know no other of the two.

    As torch's fake tensors, at a third of their time. The one value that is asked for, by transformers of a mask, is
    whether it holds everywhere: no.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:
            return torch.device("cpu")
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        args = [META if isinstance(one, torch.device) else one for one in args]
        kwargs = {name: META if isinstance(one, torch.device) else one for name, one in (kwargs or {}).items()}
        return func(*args, **kwargs)
