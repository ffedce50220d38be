"""Adapted linear layers: the base layer's output, to which the active adapters add theirs."""

import math
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import AdapterConfig
from .context import ForwardContext, StackMasks
from .inplace import GradientAdder

Task = int | Tensor | None
"""Task index; or an index per row ``[R]``, where the batch size is a multiple of R; None if no task is set."""
AdapterOutput = tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]


class Adapter(nn.Module):
    """Parameters and forward of one adapter at one layer.

    It owns its parameters directly and is called as a module, so ZeRO-3 gathers them around the forward. It returns
    everything that has a gradient, parameters of the auxiliary loss included, so ZeRO-3 gathers them for the backward.
    """

    dict_name: ClassVar[str]
    """Name of the dict of a layer's adapters, and so part of the names of saved weights."""
    config: AdapterConfig
    has_aux_loss: bool = False

    def __init__(self, d_in: int, d_out: int, config: AdapterConfig) -> None:
        super().__init__()
        self.d_in, self.d_out, self.config = d_in, d_out, config

    def forward(
        self, output: Tensor, x: Tensor, task: Task, valid: Tensor | None = None, adder: GradientAdder | None = None
    ) -> AdapterOutput:
        """Add to the base layer's output, in place if possible.

        Args:
            output: ``[B, ..., d_out]``, a new tensor of the base layer that nothing else refers to.
            x: the layer's input ``[B, ..., d_in]``.
            valid: True for the tokens that count in auxiliary losses and statistics, ``[B, ...]``; None: all.
            adder: the result of :meth:`gradient_adder`, if the base layer has read x through it.

        Returns:
            the sum ``[B, ..., d_out]`` in ``output``'s dtype; the tensors of this layer's auxiliary term (None unless
            training with gradients); the gate's W weights of each token ``[B, ..., W]``, detached (None without gate).
        """
        raise NotImplementedError

    def gradient_adder(self, x: Tensor, task: Task) -> GradientAdder | None:
        """Return the adder through which the base layer reads x, if the method's backward uses one."""
        return None

    def delta_weight(self) -> Tensor:
        """Return the change of the weight ``[d_out, d_in]``. Raises NotImplementedError if it depends on the token."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot be merged: its gate depends on the token. Do not merge."
        )

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of the adapter's products: autocast's if enabled, else the parameters'."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return next(parameter for parameter in self._parameters.values() if parameter is not None).dtype


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer and its adapters of class ``adapter_cls``.

    The base layer is always called as a module, so that its hooks run, and its output is modified in place.
    """

    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...] = ()
    base_layer: nn.Module

    if TYPE_CHECKING:  # the attributes of BaseTunerLayer, which is untyped

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module, adapter_cls: type[Adapter], context: ForwardContext) -> None:
        super().__init__()
        self.base_layer, self.adapter_cls = base_layer, adapter_cls
        self.adapter_layer_names = (adapter_cls.dict_name,)
        setattr(self, adapter_cls.dict_name, nn.ModuleDict())
        self.context = context
        self.masks = StackMasks(context, is_decoder=False)  # replaced by the model
        self.reads_encoder = False
        self.gate_weights: tuple[Tensor, Tensor | None] | None = None  # of the last forward, and its valid tokens
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters at this layer, by name."""
        return cast(nn.ModuleDict, getattr(self, self.adapter_cls.dict_name))

    def update_layer(self, adapter_name: str, config: AdapterConfig) -> None:
        """Add an adapter, on the base layer's device."""
        base = self.get_base_layer()  # its attributes give the sizes: under ZeRO-3 the weight's shape is empty
        sizes = (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)
        self.adapters[adapter_name] = self.adapter_cls(*sizes, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[B, ..., d_in]`` to ``[B, ..., d_out]``; the base layer alone if adapters are disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        calls, base_x = [], x
        for name in self.active_adapters:
            if name in self.adapters:
                adapter, task = cast(Adapter, self.adapters[name]), self.context.tasks.get(name)
                adder = adapter.gradient_adder(x, task)
                base_x = base_x if adder is None else adder.wrap(base_x)
                calls.append((adapter, task, adder))
        output = self.base_layer(base_x, *args, **kwargs)
        valid = self.masks.valid(x, self.reads_encoder)
        for adapter, task, adder in calls:
            output, aux, weights = adapter(output, x, task, valid, adder)
            if adapter.has_aux_loss and self.training:
                number = self.masks.number(x, valid, self.reads_encoder)
                self.context.record(aux, number, adapter.config)
            self.gate_weights = None if weights is None else (weights, valid)
        return output

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or the named) adapters to the base weight.

        Raises:
            NotImplementedError: an adapter is not one matrix, or the base weight is quantized.
            ValueError: ``safe_merge`` is set and the sum is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.adapters:
                continue
            weight, delta = self._weight_and_delta(name)
            merged = (weight + delta).to(weight.dtype)  # rounded once if the adapter is more precise
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f'The weights merged with adapter "{name}" are not finite. Check the adapter.')
            weight.copy_(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged adapters from the base weight again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)  # as PEFT's LoRA
        while self.merged_adapters:
            weight, delta = self._weight_and_delta(self.merged_adapters[-1])
            weight.sub_(delta)
            self.merged_adapters.pop()

    def _weight_and_delta(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the base weight and the adapter's change of it, in the base layer's layout and on its device."""
        base = self.get_base_layer()
        weight, delta = base.weight, cast(Adapter, self.adapters[name]).delta_weight()
        delta = delta.T if isinstance(base, Conv1D) else delta
        # The shape detects packed 4-bit weights in a floating-point storage, and ZeRO-3's empty weights
        if not weight.is_floating_point() or weight.shape != delta.shape:
            raise NotImplementedError(
                f"The {type(base).__name__}'s weight is quantized or partitioned ({weight.dtype} {list(weight.shape)} "
                f"instead of {list(delta.shape)}): merge into the base model loaded whole and unquantized."
            )
        return weight, delta.to(weight.device)


@torch.no_grad()
def linear_weight(*shape: int) -> nn.Parameter:
    """Return matrices ``[..., rows, d_in]`` with the initial values of linear layers: Kaiming-uniform(a=sqrt 5)."""
    weight = nn.Parameter(torch.empty(shape))
    for matrix in weight.view(-1, *shape[-2:]):  # each on its own: for a 3-D tensor torch takes r d_in as the fan-in
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return weight
