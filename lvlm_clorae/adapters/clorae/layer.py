"""The C-LoRAE layer: a frozen linear layer with a universal and N task experts under a token gate (Eqs. 3-8).

Shapes: B batch, S tokens, R rows with a task of their own, k = r + r_e, the width of both experts together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lvlm_clorae.losses.mutual_information import at_least_fp32, gaussian_variance, initial_rho, mutual_information

from .config import CLoRAEConfig
from .context import ForwardContext, StackMasks


class CLoRAEExperts(nn.Module):
    """All the parameters of one adapter at one layer, and what it adds to that layer's output.

    It owns its parameters directly and returns everything that has a gradient, so that ZeRO-3 gathers the parameters
    around its forward and backward. The task experts are stacked: every parameter gets a gradient in every step,
    whatever the task, and an absent expert's is exactly zero.

        universal_A [r, d_in], universal_B [d_out, r]                    unless use_universal is off
        expert_A [N, r_e, d_in], expert_B [N, d_out, r_e]                unless use_experts is off
        gate [2, d_in]                                                   with use_gate
        mim_scale [d_out], mim_rho [d_out]                               with use_mim; used in training only
    """

    def __init__(self, d_in: int, d_out: int, config: CLoRAEConfig) -> None:
        super().__init__()
        r, r_e, n = config.r, config.expert_r, len(config.tasks)
        assert r_e is not None  # the config resolves both
        assert config.lora_alpha is not None
        self.config = config
        self.scaling = config.lora_alpha / r
        if config.use_universal:
            self.universal_A = nn.Parameter(torch.empty(r, d_in))
            self.universal_B = nn.Parameter(torch.empty(d_out, r))
        if config.use_experts:
            self.expert_A = nn.Parameter(torch.empty(n, r_e, d_in))
            self.expert_B = nn.Parameter(torch.empty(n, d_out, r_e))
        if config.use_gate:
            self.gate = nn.Parameter(torch.empty(2, d_in))
        if config.use_mim:
            self.mim_scale = nn.Parameter(torch.empty(d_out))
            self.mim_rho = nn.Parameter(torch.empty(d_out))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start is the base model: A is Kaiming-uniform(a=sqrt 5) and B zero as in PEFT's LoRA, the gate is even.

        The MIM term starts at exactly zero: m = 1 and s^2 = 1 (see :func:`initial_rho`).
        """
        if self.config.use_universal:
            nn.init.kaiming_uniform_(self.universal_A, a=math.sqrt(5))
            nn.init.zeros_(self.universal_B)
        if self.config.use_experts:
            for matrix in self.expert_A:  # one by one: of a 3-D tensor torch would take r_e * d_in for the fan-in
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            nn.init.zeros_(self.expert_B)
        if self.config.use_gate:
            nn.init.zeros_(self.gate)
        if self.config.use_mim:
            nn.init.ones_(self.mim_scale)
            nn.init.constant_(self.mim_rho, initial_rho(self.config.mim_s_min))

    def forward(
        self, x: Tensor, task: int | Tensor | None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the experts add to the layer's output.

            U = B_U A_U x                                    (3)     D = B_n A_n x                      (4)
            g = softmax(W_g x)                               (6)     h = g[0] U + g[1] D                (7)
            delta = (alpha / r) h                            (8)     MIM(D, U)                          (5)

        computed together: z = [A_U; A_n] x, then delta = [B_U, B_n] (alpha / r) [g[0] z_U; g[1] z_n]. Nothing d_out
        wide is made but delta.

        Args:
            x: ``[B, ..., d_in]`` in the parameters' dtype
            task: index of the task expert, or an index a row ``[R]`` where B is a multiple of R
            valid: True where a token counts in the MIM term, ``[B, ...]``; None: everywhere

        Returns:
            delta ``[B, ..., d_out]``; the MIM term, a scalar (None unless training with gradients); the weight the gate
            gives to the task expert, ``[B, ...]``, detached (None without gate).

        Raises:
            ValueError: no task, or rows that do not match the batch.
        """
        config = self.config
        A, B = self._both_experts(task, x.shape[0])  # [k, d_in], [d_out, k]; with an index a row, [B, ...] of them
        tokens = x if A.dim() == 2 else x.reshape(len(x), -1, x.shape[-1])
        dropped = functional.dropout(tokens, config.lora_dropout, self.training)

        z = dropped @ A.mT
        weighted, task_weight = z, None
        if config.use_gate:
            z_universal, z_task = z.tensor_split([config.r], -1)
            g = at_least_fp32(functional.linear(tokens, self.gate)).softmax(-1)
            g_universal, g_task = g.to(z.dtype).split(1, -1)
            weighted = torch.cat([g_universal * z_universal, g_task * z_task], -1)
            task_weight = g[..., 1].detach().reshape(x.shape[:-1])
        delta = (self.scaling * weighted) @ B.mT

        mim = self._mutual_information(z, B, valid) if config.use_mim and self.training else None
        return delta.reshape(*x.shape[:-1], delta.shape[-1]), mim, task_weight

    def _both_experts(self, task: int | Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """[A_U; A_n] and [B_U, B_n], of the one task or of each row's."""
        rows = isinstance(task, Tensor) and self.config.use_experts
        A, B = [], []
        if self.config.use_universal:
            A.append(self.universal_A.expand(batch, -1, -1) if rows else self.universal_A)
            B.append(self.universal_B.expand(batch, -1, -1) if rows else self.universal_B)
        if self.config.use_experts:
            index = self._task_index(task, batch)
            A.append(self.expert_A[index])
            B.append(self.expert_B[index])
        return (A[0], B[0]) if len(A) == 1 else (torch.cat(A, -2), torch.cat(B, -1))

    def _task_index(self, task: int | Tensor | None, batch: int) -> int | Tensor:
        names = ", ".join(self.config.tasks)
        if task is None:
            raise ValueError(f"No task is set: call model.set_task(...) before the forward. Tasks: {names}.")
        if not isinstance(task, Tensor):
            return task
        beams, rest = divmod(batch, len(task))
        if rest:
            raise ValueError(
                f"set_task was given {len(task)} rows, but the batch has {batch}, which is no multiple. Tasks: {names}."
            )
        return task.to(self.expert_A.device).repeat_interleave(beams)  # beam search repeats each row in place

    def _mutual_information(self, z: Tensor, B: Tensor, valid: Tensor | None) -> Tensor | None:
        """Eq. (5) from the narrow products: ``z [..., k]``, ``B [d_out, k]``; or ``[B, T, k]``, ``[B, d_out, k]``."""
        if not torch.is_grad_enabled():
            return None
        z = z.reshape(-1, z.shape[-1]) if B.dim() == 2 else z
        valid = valid if valid is None else valid.reshape(z.shape[:-1])
        z_universal, z_task = z.tensor_split([self.config.r], -1)
        B_universal, B_task = B.tensor_split([self.config.r], -1)
        variance = gaussian_variance(self.mim_rho, self.config.mim_s_min)
        detach = self.config.mim_detach_teacher
        return mutual_information(
            z_universal, z_task, B_universal, B_task, self.mim_scale, variance, valid, detach_teacher=detach
        )


class CLoRAELayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer and its adapters: y = W0 x + (alpha / r) h (Eq. 8), summed over the active adapters."""

    adapter_layer_names: tuple[str, ...] = ("clorae_experts",)
    other_param_names: tuple[str, ...] = ()
    base_layer: nn.Module
    clorae_experts: nn.ModuleDict
    # From BaseTunerLayer, which the type checker does not see
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: CLoRAEConfig, context: ForwardContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.clorae_experts = nn.ModuleDict()
        self.context = context
        self.masks = StackMasks(context, is_decoder=False)  # the model gives it its stack's
        self.reads_encoder = False
        self.task_weight: tuple[Tensor, Tensor | None] | None = None  # of the last forward, and which tokens are valid
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: CLoRAEConfig) -> None:
        """Add an adapter, on the base layer's device."""
        d_in, d_out = linear_features(self.get_base_layer())
        self.clorae_experts[adapter_name] = CLoRAEExperts(d_in, d_out, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, ..., d_in]`` -> ``[B, ..., d_out]``; the base layer's own output where adapters are disabled."""
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        valid = self.masks.valid(x, self.reads_encoder)
        dtype = output.dtype
        for name in self.active_adapters:
            if name not in self.clorae_experts:
                continue
            experts = cast(CLoRAEExperts, self.clorae_experts[name])
            x_cast = self._cast_input_dtype(x, next(experts.parameters()).dtype)
            delta, mim, task_weight = experts(x_cast, self.context.tasks.get(name), valid)
            output = output + delta
            if experts.config.use_mim and self.training:
                self.context.record(mim, count_tokens(x, valid))
            self.task_weight = None if task_weight is None else (task_weight, valid)
        return output.to(dtype)

    def mean_task_weight(self) -> Tensor | None:
        """Mean over the last forward's valid tokens of the gate's weight for the task expert; None without gate."""
        if self.task_weight is None:
            return None
        weight, valid = self.task_weight
        if valid is None:
            return weight.mean()
        return (weight * valid).sum() / valid.sum().clamp(min=1)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(NO_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(NO_MERGE)


NO_MERGE = (
    "C-LoRAE cannot be merged into the base weights: its gate depends on the token and its expert on the task, so "
    "there is no one weight to merge into. Keep the adapter beside the model; unload() gives the bare base model."
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
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    raise TypeError(f"a {type(layer).__name__} is not a linear layer (torch.nn.Linear or transformers' Conv1D)")
