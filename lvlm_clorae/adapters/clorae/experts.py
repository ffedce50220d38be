"""The C-LoRAE experts of one layer: a universal and N task experts under a token gate (Eqs. 3-8).

Shapes: B batch, S tokens, R rows with a task of their own, k = r + r_e, the width of both experts together.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlm_clorae.adapters.inplace import InputTap
from lvlm_clorae.adapters.layer import Adapter
from lvlm_clorae.adapters.model import rows_task_index
from lvlm_clorae.losses.mutual_information import (
    at_least_fp32,
    count_valid,
    estimated_mutual_information,
    gaussian_variance,
    initial_rho,
    mutual_information,
)

from .config import CLoRAEConfig
from .fused import FusedSettings, add_experts


class CLoRAEExperts(Adapter):
    """All the parameters of one adapter at one layer, and what it adds to that layer's output.

    The task experts are stacked: every parameter gets a gradient in every step on every rank, whatever the task, and an
    absent expert's is exactly zero.

        universal_A [r, d_in], universal_B [d_out, r]                    unless use_universal is off
        expert_A [N, r_e, d_in], expert_B [N, d_out, r_e]                unless use_experts is off
        gate [2, d_in]                                                   with use_gate
        mim_scale [d_out], mim_rho [d_out]                               with use_mim; used in training only
    """

    config: CLoRAEConfig

    def __init__(self, d_in: int, d_out: int, config: CLoRAEConfig) -> None:
        super().__init__(d_in, d_out, config)
        r, r_e, n = config.r, config.expert_r, len(config.tasks)
        assert r_e is not None  # the config resolves it
        self.has_side_loss = config.use_mim
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
        self,
        output: Tensor,
        x: Tensor,
        task: int | Tensor | None,
        valid: Tensor | None = None,
        tap: InputTap | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :class:`Adapter`; the side loss is the MIM term, the one gate weight (W = 1) that of the task expert.

        One task for the batch takes the fused path. An index a row (mixed batches), and torch.compile, which fuses for
        itself, take the equations as they stand.

        Raises:
            ValueError: no task, or rows that do not match the batch.
        """
        config = self.config
        if config.use_experts and task is None:
            names = ", ".join(config.tasks)
            raise ValueError(f"No task is set: call model.set_task(...) before the forward. Tasks: {names}.")
        if not config.use_experts:
            task = None
        with_mim = config.use_mim and self.training and torch.is_grad_enabled()
        drawn = self._draw_tokens(x) if with_mim else None
        if not _is_fused(task):
            delta, mim, weight = self.equations(x, task, valid, with_mim, drawn)
            return output + delta, mim, weight
        settings = self._settings(x, task, with_mim and drawn is None)
        output, mim, weight, z = add_experts(output, x, self, valid, drawn, settings, tap)
        if drawn is not None and z is not None:
            B_n = self.expert_B[task].detach() if settings.frozen else self.expert_B[task]
            mim = self._estimate(z, self.universal_B, B_n, valid, drawn, x.shape[:-1].numel())
        return output, mim, weight

    def input_tap(self, x: Tensor, task: int | Tensor | None) -> InputTap | None:
        """See :class:`Adapter`; where nothing is dropped, dz A is the input's whole gradient."""
        dropping = self.training and self.config.lora_dropout
        wanted = torch.is_grad_enabled() and x.requires_grad and _is_fused(task) and not dropping
        return InputTap() if wanted else None

    def equations(
        self,
        x: Tensor,
        task: int | Tensor | None,
        valid: Tensor | None,
        with_mim: bool,
        drawn: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the experts add to the layer's output.

            U = B_U A_U x                                    (3)     D = B_n A_n x                      (4)
            g = softmax(W_g x)                               (6)     h = g[0] U + g[1] D                (7)
            delta = (alpha / r) h                            (8)     MIM(D, U)                          (5)

        computed together: z = [A_U; A_n] x, then delta = [B_U, B_n] (alpha / r) [g[0] z_U; g[1] z_n]. Nothing d_out
        wide is made but delta.

        Returns:
            delta ``[B, ..., d_out]``; the MIM term, a scalar, and the gate's weight ``[B, ..., 1]``, or None.
        """
        config, dtype = self.config, self.compute_dtype(x)
        A, B = self._both_experts(task, x.shape[0])  # [k, d_in], [d_out, k]; with an index a row, [B, ...] of them
        tokens = (x if A.dim() == 2 else x.reshape(len(x), -1, x.shape[-1])).to(dtype)
        dropped = functional.dropout(tokens, config.lora_dropout, self.training)

        z = dropped @ A.to(dtype).mT
        weighted, weight = z, None
        if config.use_gate:
            z_universal, z_task = z.tensor_split([config.r], -1)
            g = at_least_fp32(functional.linear(tokens, self.gate.to(dtype))).softmax(-1)
            g_universal, g_task = g.to(dtype).split(1, -1)
            weighted = torch.cat([g_universal * z_universal, g_task * z_task], -1)
            weight = g[..., 1].detach().reshape(*x.shape[:-1], 1)
        delta = (config.scaling * weighted) @ B.to(dtype).mT

        mim = self._mutual_information(z, B, valid, drawn) if with_mim else None
        return delta.reshape(*x.shape[:-1], delta.shape[-1]).to(x.dtype), mim, weight

    def _both_experts(self, task: int | Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """[A_U; A_n] and [B_U, B_n], of the one task or of each row's."""
        rows = isinstance(task, Tensor)
        A, B = [], []
        if self.config.use_universal:
            A.append(self.universal_A.expand(batch, -1, -1) if rows else self.universal_A)
            B.append(self.universal_B.expand(batch, -1, -1) if rows else self.universal_B)
        if self.config.use_experts:
            tasks = self.config.tasks
            index = rows_task_index(task, batch, tasks).to(self.expert_A.device) if isinstance(task, Tensor) else task
            A.append(self._trained(self.expert_A)[index])
            B.append(self._trained(self.expert_B)[index])
        return (A[0], B[0]) if len(A) == 1 else (torch.cat(A, -2), torch.cat(B, -1))

    def _trained(self, experts: Tensor) -> Tensor:
        """``[N, ...]`` without a graph where the task is frozen."""
        if not self.config.frozen_tasks:
            return experts
        frozen = [task in self.config.frozen_tasks for task in self.config.tasks]
        return torch.where(torch.tensor(frozen, device=experts.device)[:, None, None], experts.detach(), experts)

    def _mutual_information(self, z: Tensor, B: Tensor, valid: Tensor | None, drawn: Tensor | None) -> Tensor:
        """Eq. (5) from the narrow products: ``z [..., k]``, ``B [d_out, k]``; or ``[B, T, k]``, ``[B, d_out, k]``."""
        if drawn is not None:
            own = B if B.dim() == 2 else B[drawn // z.shape[1]]
            B_U, B_n = own.tensor_split([self.config.r], -1)
            z = z.flatten(0, -2)
            return self._estimate(z[drawn], B_U, B_n, valid, drawn, len(z))
        z = z.reshape(-1, z.shape[-1]) if B.dim() == 2 else z
        valid = valid if valid is None else valid.reshape(z.shape[:-1])
        variance = gaussian_variance(self.mim_rho, self.config.mim_s_min)
        detach = self.config.mim_detach_teacher
        return mutual_information(z, B, self.config.r, self.mim_scale, variance, valid, detach_teacher=detach)

    def _draw_tokens(self, x: Tensor) -> Tensor | None:
        """Places of ``mim_tokens`` of the T tokens of x, evenly apart from a random first one; None: of all of them.

        The first is drawn by torch's generator on the CPU, as the dropout mask's seed. What is compiled takes all.
        """
        n, total = self.config.mim_tokens, x.shape[:-1].numel()
        if not 0 < n < total or torch.compiler.is_compiling():
            return None
        first = int(torch.randint(total, ()))
        return (torch.arange(n, device=x.device) * (total // n) + first) % total

    def _estimate(self, z: Tensor, B_U: Tensor, B_n: Tensor, valid: Tensor | None, drawn: Tensor, total: int) -> Tensor:
        """Eq. (5) from the narrow products of the drawn ones of ``total`` tokens, ``z [n, k]``."""
        counted = None if valid is None else valid.flatten()[drawn]
        return estimated_mutual_information(
            *(z, B_U, B_n, self.mim_scale, gaussian_variance(self.mim_rho, self.config.mim_s_min), counted),
            *(count_valid(total, valid), total / len(drawn)),
            detach_teacher=self.config.mim_detach_teacher,
        )

    def _settings(self, x: Tensor, task: int | None, with_mim: bool) -> FusedSettings:
        config = self.config
        return FusedSettings(
            task=task,
            r=config.r if config.use_universal else 0,
            scaling=config.scaling,
            dropout=config.lora_dropout if self.training else 0.0,
            dtype=self.compute_dtype(x),
            with_mim=with_mim,
            s_min=config.mim_s_min,
            detach_teacher=config.mim_detach_teacher,
            frozen=task is not None and config.tasks[task] in config.frozen_tasks,
        )

    @torch.no_grad()
    def add_expert(self, source: int | None, trainable: bool) -> None:
        """Grow the stacks by one expert, a copy of ``source`` or fresh; ``trainable`` makes them so, else as before."""
        fresh_A = torch.empty_like(self.expert_A[0])
        nn.init.kaiming_uniform_(fresh_A, a=math.sqrt(5))
        new = {"expert_A": fresh_A, "expert_B": torch.zeros_like(self.expert_B[0])}
        for name, matrix in new.items():
            stack = getattr(self, name)
            matrix = matrix if source is None else stack[source]
            grown = torch.cat([stack, matrix.unsqueeze(0)])
            setattr(self, name, nn.Parameter(grown, requires_grad=trainable or stack.requires_grad))


def _is_fused(task: int | Tensor | None) -> TypeGuard[int | None]:
    """Whether the batch takes the fused path: one task, and not compiled."""
    return not isinstance(task, Tensor) and not torch.compiler.is_compiling()
