"""The C-LoRAE layer for one task per batch as one autograd function, with few operations and saved tensors.

With x' the dropped x, z = [A_U; A_n] x', s = alpha / r and g the gate's weight of the task expert, for every token

    forward     y += [B_U, B_n] h         h = s [(1 - g) z_U; g z_n]         in the base layer's own output
    backward    dh = [B_U, B_n]' dy       d[B_U, B_n] = sum dy h'
                dz = s [(1 - g) dh_U; g dh_n] + (dS + dS') z                 d[A_U; A_n] = sum dz x''
                dg = s (z_n' dh_n - z_U' dh_U)                               dx = dropped([A_U; A_n]' dz) + dg/dx

S = sum z z' over the valid tokens is an output: the mutual-information term is ordinary autograd on it, and z, which
would be the larger output, need not be saved.

Tokens are columns: z, h and dz are stored as [k, T], and [B_U, B_n] transposed. So rows are as long as d_in, d_out
and T, and k, which is 171 or 85 at the paper's ranks, is never the contiguous dimension: fast products need no padding.
Rows whose length is a power of two would map to the same few sets of a cache, so they are padded.

A softmax of two logits is the sigmoid of their difference, so the gate is one row, w = W_g[1] - W_g[0], a further row
of A without dropout. Saved for backward are x, which exists in any case, and g. The dropout mask is recomputed from its
seed. Without dropout the base layer's gradient of x takes in dz (see :class:`GradientAdder`), and z is recomputed
unless it is small relative to x. With dropout, where plain LoRA saves a second x and a mask, z is saved.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvlm_clorae.adapters.inplace import GradientAdder, add_product_, alias
from lvlm_clorae.losses.mutual_information import at_least_fp32, second_moment

from .config import CLoRAEConfig

PARAMETERS = ("universal_A", "universal_B", "expert_A", "expert_B", "gate")
"""The parameters that the layer's output depends on; absent ones are None."""


class Call(NamedTuple):
    """Settings of a forward; ``dropout`` is 0 in evaluation, ``task`` None without task experts."""

    config: CLoRAEConfig
    task: int | None
    dropout: float
    dtype: torch.dtype
    with_moment: bool
    adder: GradientAdder | None

    @property
    def r(self) -> int:
        return self.config.r if self.config.use_universal else 0

    def joined(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return [A_U; A_n] ``[K, d_in]``, [B_U, B_n]' ``[k, d_out]`` and w ``[d_in]``.

        Without dropout K is k + 1, and the last row of A is w. With dropout K is k, and A is divided by the share that
        is kept, so that x need not be.
        """
        universal_A, universal_B, expert_A, expert_B, gate = tensors
        A = [] if universal_A is None else [universal_A]
        B = [] if universal_B is None else [universal_B]
        if self.task is not None and expert_A is not None and expert_B is not None:
            A.append(expert_A[self.task])
            B.append(expert_B[self.task])
        ranks = [len(part) for part in A]
        w = None if gate is None else (gate[1] - gate[0]).to(self.dtype)
        if w is not None and not self.dropout:
            A.append(w.unsqueeze(0))
        joined_A = torch.cat([part.to(self.dtype) for part in A])
        if self.dropout:
            joined_A /= 1 - self.dropout
        joined_B = _padded(joined_A, sum(ranks), len(B[0]))
        for rows, part in zip(joined_B.split(ranks), B, strict=True):
            rows.copy_(part.T)
        return joined_A, joined_B, w

    def by_expert(self, d: Tensor, universal: Tensor | None, experts: Tensor | None, dim: int) -> list[Tensor | None]:
        """Split the gradient of a joined matrix along its ranks; an absent or frozen expert's is zero."""
        d_universal, d_task = d.tensor_split([self.r], dim)
        d_experts = None if experts is None else torch.zeros_like(experts)
        if d_experts is not None and self.config.tasks[cast(int, self.task)] not in self.config.frozen_tasks:
            d_experts[self.task] = d_task
        return [None if universal is None else d_universal.to(universal.dtype), d_experts]


class AddExperts(torch.autograd.Function):
    """Add to ``output`` in place; return it, S ``[1, k, k]`` if asked for, and the gate's weight ``[B, ..., 1]``."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, valid: Tensor | None, call: Call, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # The CPU's generator needs no device synchronization, and checkpointing restores its state
        seed = int(torch.randint(2**62, ())) if call.dropout else 0
        with torch.autocast(x.device.type, enabled=False):
            A, B, w = call.joined(tensors)
            k = len(B)
            tokens = x.reshape(-1, x.shape[-1]).to(call.dtype)
            z = _product(A, _drop(tokens, keep_mask(tokens, seed, call.dropout)).T)
            g = None if w is None else at_least_fp32(tokens @ w if call.dropout else z[k]).sigmoid()
            h = _weigh(z, g, k, call)
            output = alias(output)
            add_product_(output, h.T, B.T)
            S = None
            if call.with_moment:
                S = second_moment(z[:k].T, None if valid is None else valid.flatten()).unsqueeze(0)
        # z is saved with dropout, and where it is small relative to x; else it is recomputed
        saved_z = z if call.dropout or 32 * k <= x.shape[-1] else None
        ctx.save_for_backward(x, valid, g, saved_z, *tensors)
        ctx.call, ctx.seed = call, seed
        weight = None if g is None else g.reshape(*x.shape[:-1], 1)
        if weight is not None:
            ctx.mark_non_differentiable(weight)
        return output, S, weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dS: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x, valid, g, z, *tensors = ctx.saved_tensors
        call: Call = ctx.call
        universal_A, universal_B, expert_A, expert_B, gate = tensors
        with torch.autocast(x.device.type, enabled=False):
            A, B, w = call.joined(tensors)
            k = len(B)
            tokens = x.reshape(-1, x.shape[-1]).to(call.dtype)
            mask = keep_mask(tokens, ctx.seed, call.dropout)
            dropped = _drop(tokens, mask)
            z = _product(A, dropped.T) if z is None else z
            rows = dy.reshape(-1, dy.shape[-1]).to(call.dtype)

            dh = _product(B, rows.T)
            dB = _product(_weigh(z, g, k, call), rows)
            dz = _padded(z, *z.shape)
            _weigh(dh, g, k, call, out=dz[:k])
            if call.with_moment and dS is not None:
                first = call.r if call.config.mim_detach_teacher else 0
                counted = z[:k] if valid is None else z[:k] * valid.flatten()
                dz[first:k].addmm_((dS[0] + dS[0].T)[first:].to(z.dtype), counted)
            d_logit = None
            if g is not None:
                products = at_least_fp32(z[:k] * dh)
                dg = products[call.r :].sum(0) - products[: call.r].sum(0)
                d_logit = (call.config.scaling * dg * g * (1 - g)).to(z.dtype)
                if not call.dropout:
                    dz[k] = d_logit
            dA, dx, dw = dz @ dropped, None, None
            if call.dropout:
                dA /= 1 - call.dropout
            if d_logit is not None:
                dw = d_logit @ tokens if call.dropout else dA[k]
            if call.adder is not None and ctx.needs_input_grad[0]:  # the base layer's backward runs
                call.adder.product = dz.T, A
            elif ctx.needs_input_grad[1]:
                dx = _drop(dz.T @ A, mask)
                if call.dropout and d_logit is not None and w is not None:
                    dx.addr_(d_logit, w)
                dx = dx.view(x.shape).to(x.dtype)
        dA_U, dA_n = call.by_expert(dA[:k], universal_A, expert_A, 0)
        dB_U, dB_n = call.by_expert(dB.T, universal_B, expert_B, 1)
        dgate = None if dw is None else torch.stack([-dw, dw]).to(gate.dtype)
        return dy, dx, None, None, dA_U, dB_U, dA_n, dB_n, dgate


def _padded(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return an empty matrix with a gap between its rows, each of which begins at a multiple of 32 elements.

    On a CPU the gap is zero in 16 bits: oneDNN's products on AMX read elements of it, which they multiply by zero, and
    that is NaN where the memory happened to have NaN or infinity.
    """
    whole = like.new_empty(rows, columns + -columns % 32 + 32)
    if whole.device.type == "cpu" and whole.itemsize == 2:
        whole[:, columns:].zero_()
    return whole[:, :columns]


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=_padded(a, a.shape[0], b.shape[1]))


def _weigh(z: Tensor, g: Tensor | None, k: int, call: Call, out: Tensor | None = None) -> Tensor:
    """Return s [(1 - g) z_U; g z_n] ``[k, T]``; z in forward, dh in backward."""
    h = _padded(z, k, z.shape[1]) if out is None else out
    r, scaling = call.r, call.config.scaling
    if g is None:
        return torch.mul(z[:k], scaling, out=h)
    weight = (scaling * g).to(z.dtype)
    torch.mul(z[:r], scaling - weight, out=h[:r])
    torch.mul(z[r:k], weight, out=h[r:])
    return h


def keep_mask(x: Tensor, seed: int, dropout: float) -> Tensor | None:
    """Return a seed's dropout mask in x's shape, True where x is kept, or None; a 64-bit number gives four elements."""
    if not dropout:
        return None
    generator = torch.Generator(x.device).manual_seed(seed)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: x.numel()].view(x.shape) >= round(dropout * 2**16) - 2**15


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
