"""An adapted linear layer, whatever the method: the base layer's output, to which the active adapters add theirs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import AdapterConfig
from .context import ForwardContext, StackMasks
from .inplace import InputTap


class Adapter(nn.Module):
    """One adapter at one layer: it owns its parameters directly and is called, so ZeRO-3 gathers them around its use.

    Everything that has a gradient it returns, so that ZeRO-3 gathers the parameters around its backward too.
    """

    config: AdapterConfig
    has_side_loss: bool = False

    def __init__(self, d_in: int, d_out: int, config: AdapterConfig) -> None:
        super().__init__()
        self.d_in, self.d_out, self.config = d_in, d_out, config

    def forward(
        self,
        output: Tensor,
        x: Tensor,
        task: int | Tensor | None,
        valid: Tensor | None = None,
        tap: InputTap | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Add to the base layer's output, in place where that is sound.

        Args:
            output: ``[B, ..., d_out]``, just made by the base layer and held by nobody else
            x: the layer's input ``[B, ..., d_in]``
            task: index of the task, or an index a row ``[R]`` where B is a multiple of R; None where none is set
            valid: True where a token counts in side losses and statistics, ``[B, ...]``; None: everywhere
            tap: what :meth:`input_tap` gave, where the base layer has read x through it

        Returns:
            the sum ``[B, ..., d_out]`` in ``output``'s dtype; what the side loss needs of this layer (None unless
            training with gradients); the gate's W weights of each token ``[B, ..., W]``, detached (None without gate).
        """
        raise NotImplementedError

    def input_tap(self, x: Tensor, task: int | Tensor | None) -> InputTap | None:
        """Through what the base layer is to read x, for a method that gives its part of x's gradient to it."""
        return None

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight ``[d_out, d_in]``. Raises NotImplementedError where that is no matrix."""
        raise NotImplementedError(f"{type(self).__name__}: {NO_MERGE}")

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the adapter's products: autocast's where it is on, else the parameters'."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return next(self.parameters()).dtype


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer and its adapters. A method gives ``adapter_cls`` and the name of the dict that holds them.

    The base layer is always called as a module (ZeRO-3's and others' hooks run), and its output is written to in place:
    no second tensor of its size is made.
    """

    adapter_cls: ClassVar[type[Adapter]]
    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...] = ()
    base_layer: nn.Module
    # From BaseTunerLayer, which the type checker does not see
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: AdapterConfig, context: ForwardContext
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.context = context
        self.masks = StackMasks(context, is_decoder=False)  # the model gives it its stack's
        self.reads_encoder = False
        self.gate_weights: tuple[Tensor, Tensor | None] | None = None  # of the last forward, and which tokens are valid
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters at this layer, by name."""
        return cast(nn.ModuleDict, getattr(self, self.adapter_layer_names[0]))

    def update_layer(self, adapter_name: str, config: AdapterConfig) -> None:
        """Add an adapter, on the base layer's device."""
        d_in, d_out = linear_features(self.get_base_layer())
        self.adapters[adapter_name] = self.adapter_cls(d_in, d_out, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, ..., d_in]`` -> ``[B, ..., d_out]``; the base layer's own output where adapters are disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        calls, base_x = [], x
        for name in self.active_adapters:
            if name in self.adapters:
                adapter, task = cast(Adapter, self.adapters[name]), self.context.tasks.get(name)
                tap = adapter.input_tap(x, task)
                base_x = base_x if tap is None else tap.open(base_x)
                calls.append((adapter, task, tap))
        output = self.base_layer(base_x, *args, **kwargs)
        valid = self.masks.valid(x, self.reads_encoder)
        for adapter, task, tap in calls:
            output, side, weights = adapter(output, x, task, valid, tap)
            if adapter.has_side_loss and self.training:
                self.context.record(side, count_tokens(x, valid))
            self.gate_weights = None if weights is None else (weights, valid)
        return output

    def mean_gate_weights(self) -> Tensor | None:
        """Mean over the last forward's valid tokens of the gate's weights, ``[W]``; None without gate."""
        if self.gate_weights is None:
            return None
        weights, valid = self.gate_weights
        weights = weights.flatten(0, -2).float()
        if valid is None:
            return weights.mean(0)
        return (weights * valid.flatten().unsqueeze(-1)).sum(0) / valid.sum().clamp(min=1)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or the named) adapters to the base weight.

        Raises:
            NotImplementedError: an adapter that is no matrix, or a quantised base weight.
            ValueError: ``safe_merge``, and the sum is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.adapters:
                continue
            weight, delta = self._weight_and_delta(name)
            merged = (weight + delta).to(weight.dtype)  # rounded once, where the adapter is the more precise
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f'The weights merged with adapter "{name}" are not finite. It seems to be broken.')
            weight.copy_(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)  # as PEFT's LoRA
        while self.merged_adapters:
            weight, delta = self._weight_and_delta(self.merged_adapters[-1])
            weight.sub_(delta)
            self.merged_adapters.pop()

    def _weight_and_delta(self, name: str) -> tuple[Tensor, Tensor]:
        """The base weight and what the adapter adds to it, in the base layer's layout and on its device."""
        base = self.get_base_layer()
        weight, delta = cast(Tensor, base.weight), cast(Adapter, self.adapters[name]).delta_weight()
        delta = delta.T if isinstance(base, Conv1D) else delta
        # The shape tells packed 4-bit weights in a floating-point storage, and ZeRO-3's empty ones
        if not weight.is_floating_point() or weight.shape != delta.shape:
            raise NotImplementedError(
                f"The weight of this {type(base).__name__} is {weight.dtype} {list(weight.shape)}, not floating-point "
                f"numbers {list(delta.shape)}: it is quantised or partitioned, so nothing exact can be merged into it. "
                "Merge into the base model loaded whole and unquantised."
            )
        return weight, delta.to(weight.device)


NO_MERGE = (
    "cannot be merged into the base weights: the gate depends on the token, so there is no one weight to merge into. "
    "Keep the adapter beside the model; unload() gives the bare base model."
)


def count_tokens(x: Tensor, valid: Tensor | None) -> Tensor:
    """How many tokens of x ``[B, ..., d_in]`` are valid, a float scalar on its device; no synchronisation."""
    if valid is not None:
        return valid.sum().float()
    return torch.full((), x.shape[:-1].numel(), dtype=torch.float32, device=x.device)


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer, from its attributes: under ZeRO-3 the weight's shape is empty.

    Raises:
        TypeError: not a layer that can be adapted.
    """
    if isinstance(layer, nn.Linear):  # bitsandbytes' Linear8bitLt and Linear4bit are, too
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    raise TypeError(
        f"a {type(layer).__name__} is not a linear layer (torch.nn.Linear, transformers' Conv1D, bitsandbytes' "
        "Linear8bitLt or Linear4bit)"
    )
