"""The C-LoRAE experts of one layer: a universal and N task experts under a token gate (Eqs. 3-8).

Shapes: B batch, N tasks, r and r_e ranks of the universal and of a task expert, k = r + r_e.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlm_clorae.adapters.inplace import GradientAdder, add_product_
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
    columns: Tensor

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
        self.register_buffer("columns", self._columns(), persistent=False)
        self._kept: tuple[Any, tuple[Tensor, Tensor]] | None = None
        if config.use_mim:
            self.mim_scale = nn.Parameter(torch.ones(d_out))
            self.mim_rho = nn.Parameter(torch.full((d_out,), initial_rho(config.mim_s_min)))

    def equations(
        self, output: Tensor, x: Tensor, task: Task, valid: Tensor | None, with_moment: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the layer's output with the experts, S if asked for, and the gate's weight ``[B, ..., 1]``.

            U = B_U A_U x                                    (3)     D = B_n A_n x                      (4)
            g = softmax(W_g x)                               (6)     h = g[0] U + g[1] D                (7)
            y = W_0 x + (alpha / r) h                        (8)

        together: z = [A_U; A_n] x, then y = W_0 x + (alpha / r) [B_U, B_n] [g[0] z_U; g[1] z_n].
        """
        config, dtype = self.config, self.compute_dtype(x)
        index = expand_task_index(task, len(x), config.tasks).to(x.device) if isinstance(task, Tensor) else task
        A, B = self.joined(index, dtype)
        tokens = x.reshape(*([len(x)] if isinstance(index, Tensor) else []), -1, x.shape[-1]).to(dtype)
        dropout = config.lora_dropout if self.training else 0.0
        k = B.shape[1]

        products = (functional.dropout(tokens, dropout) if dropout else tokens) @ A.T
        z, logits = products.tensor_split([k], -1)
        columns = self.columns[index] if isinstance(index, Tensor) else self.columns[0, :, :k]
        h, weight = z, None
        if config.use_gate:
            g = at_least_fp32(tokens @ self.gate.to(dtype).T if dropout else logits).softmax(-1)
            h = z * (g.to(dtype) @ columns.to(dtype))
            weight = g[..., 1].detach().reshape(*x.shape[:-1], 1)
        elif isinstance(index, Tensor):
            h = z * columns.sum(-2, keepdim=True).to(dtype)
        total = _add_product(output.reshape(*tokens.shape[:-1], -1), h, B, config.scaling)

        S = self._second_moments(z, index, valid) if with_moment else None
        return total.view(output.shape), S, weight

    def forward(
        self, output: Tensor, x: Tensor, task: Task, valid: Tensor | None = None, adder: GradientAdder | None = None
    ) -> AdapterOutput:
        """See :class:`Adapter`. The gate weight (W = 1) is that of the task expert.

        A batch of one task is trained by the fused function; evaluation, mixed batches (an index per row) and
        torch.compile take :meth:`equations`. The auxiliary term's tensors are the arguments of
        :func:`mutual_information` for this layer: S ``[n, k, k]``, B_U ``[d_out, r]``, B_n ``[n, d_out, r_e]``, m and
        rho ``[d_out]``; n is 1 for one task or N.
        """
        config = self.config
        if not config.use_experts:
            task = None
        elif task is None:
            raise ValueError(f"No task is set: call model.set_task(...) before the forward. Tasks: {config.tasks}.")
        with_moment = config.use_mim and self.training and torch.is_grad_enabled()
        if with_moment and valid is not None and len(valid) != len(x):  # a packed row: in how many rows a token counts
            valid = valid.sum(0, keepdim=True)
        if _is_fused(task) and (self.training or torch.is_grad_enabled()):
            dropout = config.lora_dropout if self.training else 0.0
            call = Call(config, task, dropout, self.compute_dtype(x), with_moment, adder)
            parameters = (getattr(self, name, None) for name in PARAMETERS)
            output, S, weight = AddExperts.apply(output, x, valid, call, *parameters)
        else:
            output, S, weight = self.equations(output, x, task, valid, with_moment)
        if S is None:
            return output, None, weight
        # Views, which remain valid when ZeRO-3 releases the parameters after this forward
        tasks = slice(task, task + 1) if isinstance(task, int) else slice(None)
        B_n = self._with_gradient(self.expert_B)[tasks]
        B_U, m, rho = (weight.view(weight.shape) for weight in (self.universal_B, self.mim_scale, self.mim_rho))
        return output, (S, B_U, B_n, m, rho), weight

    def gradient_adder(self, x: Tensor, task: Task) -> GradientAdder | None:
        """See :class:`Adapter`. Without dropout, dz A is the experts' whole gradient of x."""
        has_dropout = self.training and self.config.lora_dropout
        used = torch.is_grad_enabled() and x.requires_grad and _is_fused(task) and not has_dropout
        return GradientAdder() if used else None

    def joined(self, index: Task, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A ``[k, d_in]`` followed by W_g ``[2, d_in]`` if there is a gate, and B ``[d_out, k]``.

        For one task they are [A_U; A_n] and [B_U, B_n], with k = r + r_e. For an index per row they have the experts of
        all tasks, and :attr:`columns` selects. In evaluation without gradients they are kept until a parameter changes,
        since joining them for every new token takes longer than all products with it.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._join(index, dtype)
        parameters = [parameter for parameter in self._parameters.values() if parameter is not None]
        if parameters[0].is_inference():  # it has no version
            return self._join(index, dtype)
        state = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        key = "all" if isinstance(index, Tensor) else index, dtype, state
        kept = self._kept
        if kept is None or kept[0] != key:
            kept = self._kept = key, self._join(index, dtype)
        return kept[1]

    def train(self, mode: bool = True) -> "CLoRAEExperts":
        """Set the mode. What is kept is released: optimizers change parameters in ways that no version counts."""
        self._kept = None
        return super().train(mode)

    def _join(self, index: Task, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make the result of :meth:`joined`."""
        A: list[Tensor] = []
        B: list[Tensor] = []
        if self.config.use_universal:
            A, B = [self.universal_A], [self.universal_B]
        if self.config.use_experts:
            experts = range(len(self.config.tasks)) if isinstance(index, Tensor) else [index]
            all_A, all_B = self._with_gradient(self.expert_A), self._with_gradient(self.expert_B)
            A += [all_A[task] for task in experts]
            B += [all_B[task] for task in experts]
        A += [self.gate] if self.config.use_gate else []
        return torch.cat(A).to(dtype), torch.cat(B, 1).to(dtype)

    def _with_gradient(self, experts: Tensor) -> Tensor:
        """Return ``[N, ...]``, without a graph for frozen tasks."""
        if not self.config.frozen_tasks:
            return experts
        frozen = [task in self.config.frozen_tasks for task in self.config.tasks]
        return torch.where(torch.tensor(frozen, device=experts.device)[:, None, None], experts.detach(), experts)

    def _columns(self) -> Tensor:
        """Return 1 where z of all experts is the universal expert's, and where task n's, ``[N, 2, r + N r_e]``."""
        config, n = self.config, len(self.config.tasks)
        r, r_e = config.r if config.use_universal else 0, (config.expert_r or 0) if config.use_experts else 0
        universal = torch.cat([torch.ones(n, r), torch.zeros(n, n * r_e)], 1)
        own = torch.cat([torch.zeros(n, r), torch.eye(n).unsqueeze(-1).expand(n, n, r_e).flatten(1)], 1)
        return torch.stack([universal, own], 1)

    def _second_moments(self, z: Tensor, index: Task, valid: Tensor | None) -> Tensor:
        """Return the second moments of z ``[B, ..., k]`` by task, ``[n, k, k]``."""
        r = self.config.r
        if isinstance(index, Tensor):  # of the experts of all tasks each row's own
            experts = z[..., r:].unflatten(-1, (len(self.config.tasks), -1))
            own = experts[torch.arange(len(z), device=z.device), :, index]
            z = torch.cat([z[..., :r], own], -1)
        z = z.reshape(len(z) if isinstance(index, Tensor) else 1, -1, z.shape[-1])
        if self.config.mim_detach_teacher:
            z = torch.cat([z[..., :r].detach(), z[..., r:]], -1)
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
        self.columns = self._columns().to(self.columns)


def _add_product(output: Tensor, h: Tensor, B: Tensor, factor: float) -> Tensor:
    """Return ``output + factor h B'`` for output ``[..., d_out]`` and h ``[..., k]``; one operation if of one dtype.

    It is ``output`` itself without gradients, outside torch.compile.
    """
    with torch.autocast(output.device.type, enabled=False):
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            add_product_(output, h.flatten(0, -2), B, factor)
            return output
        if output.dtype != h.dtype:
            return output.add((h @ B.T).to(output.dtype), alpha=factor)
        return torch.addmm(output.flatten(0, -2), h.flatten(0, -2), B.T, alpha=factor).view(output.shape)


def _is_fused(task: Task) -> TypeGuard[int | None]:
    return not isinstance(task, Tensor) and not torch.compiler.is_compiling()
