"""The C-LoRAE experts of one layer: a universal and N task experts under a token gate (Eqs. 3-8).

Shapes: B batch, N tasks, r and r_e ranks of the universal and of a task expert, k = r + r_e.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlm_clorae.adapters.inplace import GradientAdder
from lvlm_clorae.adapters.layer import Adapter, AdapterOutput, Task, linear_weight
from lvlm_clorae.adapters.model import expand_task_index
from lvlm_clorae.losses.mutual_information import at_least_fp32, initial_rho, second_moment

from .config import CLoRAEConfig
from .fused import PARAMETERS, AddExperts, Call


class CLoRAEExperts(Adapter):
    """Parameters and forward of one adapter at one layer: y = W0 x + (alpha / r) h (Eq. 8), summed over adapters.

    The task experts are stacked: every parameter gets a gradient in every step on every rank, whatever the task, and an
    absent expert's is exactly zero. The model starts as the base model with an even gate, since B and the gate are
    zero, and the MIM term at exactly zero: m = 1 and s^2 = 1.
    """

    dict_name = "clorae_experts"
    config: CLoRAEConfig

    def __init__(self, d_in: int, d_out: int, config: CLoRAEConfig) -> None:
        super().__init__(d_in, d_out, config)
        r, r_e, n = config.r, config.expert_r, len(config.tasks)
        assert r_e is not None  # set by the config
        self.has_aux_loss = config.use_mim
        if config.use_universal:
            self.universal_A, self.universal_B = linear_weight(r, d_in), nn.Parameter(torch.zeros(d_out, r))
        if config.use_experts:
            self.expert_A, self.expert_B = linear_weight(n, r_e, d_in), nn.Parameter(torch.zeros(n, d_out, r_e))
        if config.use_gate:
            self.gate = nn.Parameter(torch.zeros(2, d_in))
        if config.use_mim:
            self.mim_scale = nn.Parameter(torch.ones(d_out))
            self.mim_rho = nn.Parameter(torch.full((d_out,), initial_rho(config.mim_s_min)))

    def equations(
        self, x: Tensor, task: Task, valid: Tensor | None, with_moment: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what the experts add to the layer's output, S if asked for, and the gate's weight ``[B, ..., 1]``.

            U = B_U A_U x                                    (3)     D = B_n A_n x                      (4)
            g = softmax(W_g x)                               (6)     h = g[0] U + g[1] D                (7)
            delta = (alpha / r) h                            (8)

        together: z = [A_U; A_n] x, then delta = [B_U, B_n] (alpha / r) [g[0] z_U; g[1] z_n].
        """
        config, dtype = self.config, self.compute_dtype(x)
        index = expand_task_index(task, len(x), config.tasks).to(x.device) if isinstance(task, Tensor) else task
        A, B = self._joined(index)  # [k, d_in], [d_out, k]; with an index per row, [B, ...]
        tokens = (x.reshape(len(x), -1, x.shape[-1]) if A.dim() == 3 else x).to(dtype)
        dropped = functional.dropout(tokens, config.lora_dropout, self.training)

        z = dropped @ A.to(dtype).mT
        h, weight = z, None
        if config.use_gate:
            z_U, z_n = z.tensor_split([config.r], -1)
            g = at_least_fp32(functional.linear(tokens, self.gate.to(dtype))).softmax(-1)
            g_U, g_n = g.to(dtype).split(1, -1)
            h = torch.cat([g_U * z_U, g_n * z_n], -1)
            weight = g[..., 1].detach().reshape(*x.shape[:-1], 1)
        delta = (config.scaling * h) @ B.to(dtype).mT

        S = self._second_moments(z, index, valid) if with_moment else None
        return delta.reshape(*x.shape[:-1], delta.shape[-1]).to(x.dtype), S, weight

    def forward(
        self, output: Tensor, x: Tensor, task: Task, valid: Tensor | None = None, adder: GradientAdder | None = None
    ) -> AdapterOutput:
        """See :class:`Adapter`. The gate weight (W = 1) is that of the task expert.

        A batch of one task is computed by the fused function; mixed batches (an index per row) and torch.compile by
        :meth:`equations`. The auxiliary term's tensors are the arguments of :func:`mutual_information` for this layer:
        S ``[n, k, k]``, B_U ``[d_out, r]``, B_n ``[n, d_out, r_e]``, m and rho ``[d_out]``; n is 1 for one task or N.
        """
        config = self.config
        if not config.use_experts:
            task = None
        elif task is None:
            raise ValueError(f"No task is set: call model.set_task(...) before the forward. Tasks: {config.tasks}.")
        with_moment = config.use_mim and self.training and torch.is_grad_enabled()
        if _is_fused(task):
            dropout = config.lora_dropout if self.training else 0.0
            call = Call(config, task, dropout, self.compute_dtype(x), with_moment, adder)
            parameters = (getattr(self, name, None) for name in PARAMETERS)
            output, S, weight = AddExperts.apply(output, x, valid, call, *parameters)
        else:
            delta, S, weight = self.equations(x, task, valid, with_moment)
            output = output + delta
        if S is None:
            return output, None, weight
        # Views, which remain valid when ZeRO-3 releases the parameters after this forward
        tasks = slice(task, task + 1) if isinstance(task, int) else slice(None)
        B_n = self._with_gradient(self.expert_B)[tasks]
        return output, (S, self.universal_B[:], B_n, self.mim_scale[:], self.mim_rho[:]), weight

    def gradient_adder(self, x: Tensor, task: Task) -> GradientAdder | None:
        """See :class:`Adapter`. Without dropout, dz A is the experts' whole gradient of x."""
        has_dropout = self.training and self.config.lora_dropout
        used = torch.is_grad_enabled() and x.requires_grad and _is_fused(task) and not has_dropout
        return GradientAdder() if used else None

    def _joined(self, index: Task) -> tuple[Tensor, Tensor]:
        """Return [A_U; A_n] and [B_U, B_n] for one task, or for each row's."""
        A, B = [], []
        if self.config.use_universal:
            rows = (len(index), -1, -1) if isinstance(index, Tensor) else (-1, -1)
            A, B = [self.universal_A.expand(rows)], [self.universal_B.expand(rows)]
        if self.config.use_experts:
            A.append(self._with_gradient(self.expert_A)[index])
            B.append(self._with_gradient(self.expert_B)[index])
        return torch.cat(A, -2), torch.cat(B, -1)

    def _with_gradient(self, experts: Tensor) -> Tensor:
        """Return ``[N, ...]``, without a graph for frozen tasks."""
        if not self.config.frozen_tasks:
            return experts
        frozen = [task in self.config.frozen_tasks for task in self.config.tasks]
        return torch.where(torch.tensor(frozen, device=experts.device)[:, None, None], experts.detach(), experts)

    def _second_moments(self, z: Tensor, index: Task, valid: Tensor | None) -> Tensor:
        """Return the second moments of z ``[B, ..., k]`` by task, ``[n, k, k]``."""
        z = z.reshape(len(z) if isinstance(index, Tensor) else 1, -1, z.shape[-1])
        if self.config.mim_detach_teacher:
            z = torch.cat([z[..., : self.config.r].detach(), z[..., self.config.r :]], -1)
        S = second_moment(z, None if valid is None else valid.reshape(z.shape[:-1]))
        if not isinstance(index, Tensor):
            return S
        return S.new_zeros(len(self.config.tasks), *S.shape[1:]).index_add(0, index, S)

    @torch.no_grad()
    def add_expert(self, source: int | None, trainable: bool) -> None:
        """Append an expert to the stacks: a copy of the expert ``source``, or a newly initialized one if None.

        ``trainable`` makes the stacks trainable; otherwise they stay as they are.
        """
        A, B = self.expert_A, self.expert_B
        new = (linear_weight(*A.shape[1:]).to(A), torch.zeros_like(B[0])) if source is None else (A[source], B[source])
        for name, stack, matrix in (("expert_A", A, new[0]), ("expert_B", B, new[1])):
            grown = torch.cat([stack, matrix.unsqueeze(0)])
            setattr(self, name, nn.Parameter(grown, requires_grad=trainable or stack.requires_grad))


def _is_fused(task: Task) -> TypeGuard[int | None]:
    return not isinstance(task, Tensor) and not torch.compiler.is_compiling()
