"""The C-LoRAE layer for one task per batch as one autograd function, with few operations and saved tensors.

With x' = x where the dropout mask keeps it, c = 1 / (1 - dropout), z = [A_U; A_n] x', a = c alpha / r and the gate's
weights g = softmax(W_g x), for every token

    forward     y += a [B_U, B_n] h          h = [g_0 z_U; g_1 z_n]          in the base layer's own output
    backward    dh = a [B_U, B_n]' dy        d[B_U, B_n] = a sum dy h'
                dz = [g_0 dh_U; g_1 dh_n] + c^2 (dS + dS') z                 d[A_U; A_n] = sum dz x''
                dg = [z_U' dh_U; z_n' dh_n]  dx = mask [A_U; A_n]' dz + W_g' d(W_g x)

S = c^2 sum z z' over the valid tokens is an output: the mutual-information term is ordinary autograd on it, and z,
which would be the larger output, need not be saved. The factors c and a are part of the products.

The joined matrices [A_U; A_n] and [B_U, B_n], and so z, h and dz ``[T, k]``, are filled up to a multiple of 8 columns,
which are not used: k is odd at the paper's ranks, 171 or 85, and products of odd width are slow.

A GPU pays for every operation, whatever its size, so there are few of them (tests/benchmarks/test_launches.py). Without
dropout W_g is two further rows of A, and the base layer's gradient of x takes in dz (see :class:`GradientAdder`). Saved
for backward are x, which exists in any case, and g. The dropout mask is recomputed from its seed. Without dropout z is
recomputed unless it is small relative to x. With dropout, where plain LoRA saves a second x and a mask, z is saved.
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

    @property
    def kept(self) -> float:
        """1 / (1 - dropout)"""
        return 1 / (1 - self.dropout)

    @property
    def scaling(self) -> float:
        return self.config.scaling * self.kept

    def joined(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, int]:
        """Return [A_U; A_n] ``[>= k, d_in]``, without dropout followed by W_g, [B_U, B_n] ``[d_out, >= k]``, and k."""
        universal_A, universal_B, expert_A, expert_B, gate = tensors
        A = [] if universal_A is None else [universal_A]
        B = [] if universal_B is None else [universal_B]
        if self.task is not None and expert_A is not None and expert_B is not None:
            A.append(expert_A[self.task])
            B.append(expert_B[self.task])
        k = sum(map(len, A))
        if gate is not None and not self.dropout:
            A.append(gate)
        rows = sum(map(len, A))
        width = rows + -rows % 8
        A.append(A[0][:1].expand(width - rows, -1))  # any finite rows and columns, which are not used
        B.append(B[0][:, :1].expand(-1, width - k))
        like = A[0].new_empty(0, dtype=self.dtype)
        joined_A, joined_B = like.new_empty(width, A[0].shape[1]), like.new_empty(len(B[0]), width)
        return torch.cat(A, out=joined_A), torch.cat(B, 1, out=joined_B), k

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
            A, B, k = call.joined(tensors)
            tokens, gate = x.reshape(-1, x.shape[-1]).to(call.dtype), tensors[-1]
            z = _drop(tokens, keep_mask(tokens, seed, call.dropout)) @ A.T
            g = None
            if gate is not None:
                logits = tokens @ gate.to(call.dtype).T if call.dropout else z[:, k : k + 2]
                g = at_least_fp32(logits).softmax(-1)
            output = alias(output)
            add_product_(output, _weigh(z, g, call.r)[:, :k], B[:, :k], call.scaling)
            S = None
            if call.with_moment:
                S = second_moment(z[:, :k], None if valid is None else valid.flatten()).unsqueeze(0)
                S = S.mul_(call.kept**2) if call.dropout else S
        # z is saved with dropout, and where it is small relative to x; else it is recomputed
        saved_z = z if call.dropout or 32 * k <= x.shape[-1] else None
        ctx.save_for_backward(x, valid, g, saved_z, *tensors)
        ctx.call, ctx.seed = call, seed
        weight = None if g is None else g[:, 1].reshape(*x.shape[:-1], 1)
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
            (A, B, k), r = call.joined(tensors), call.r
            tokens = x.reshape(-1, x.shape[-1]).to(call.dtype)
            mask = keep_mask(tokens, ctx.seed, call.dropout)
            dropped = _drop(tokens, mask)
            z = dropped @ A.T if z is None else z
            rows = dy.reshape(-1, dy.shape[-1]).to(call.dtype)

            dh = _product(rows, B, call.scaling)
            dB = _product(_weigh(z, g, r).T, rows, call.scaling)
            dz = _weigh(dh, g, r)
            if call.with_moment and dS is not None:
                first = r if call.config.mim_detach_teacher else 0
                counted = z[:, :k] if valid is None else z[:, :k] * valid.view(-1, 1)
                dz[:, first:k].addmm_(counted, (dS[0] + dS[0].T)[:, first:].to(z.dtype), alpha=call.kept**2)
            d_logits = None
            if g is not None:
                products, dg = z * dh, torch.empty_like(g)
                for part, group in zip(dg.unbind(-1), (products[:, :r], products[:, r:k]), strict=True):
                    torch.sum(group, -1, dtype=g.dtype, out=part)
                d_logits = torch.ops.aten._softmax_backward_data(dg, g, -1, g.dtype).to(z.dtype)
                if not call.dropout:
                    dz[:, k : k + 2] = d_logits
            dA, dx, dgate = dz.T @ dropped, None, None
            used = k if g is None or call.dropout else k + 2
            if gate is not None and d_logits is not None:
                dgate = (d_logits.T @ tokens if call.dropout else dA[k : k + 2]).to(gate.dtype)
            if call.adder is not None and ctx.needs_input_grad[0]:  # the base layer's backward runs
                call.adder.product = dz[:, :used], A[:used]
            elif ctx.needs_input_grad[1]:
                dx = _drop(dz[:, :used] @ A[:used], mask)
                if call.dropout and d_logits is not None:
                    dx.addmm_(d_logits, gate.to(dx.dtype))
                dx = dx.view(x.shape).to(x.dtype)
        dA_U, dA_n = call.by_expert(dA[:k], universal_A, expert_A, 0)
        dB_U, dB_n = call.by_expert(dB[:k].T, universal_B, expert_B, 1)
        return dy, dx, None, None, dA_U, dB_U, dA_n, dB_n, dgate


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    return a.new_empty(len(a), b.shape[1]).addmm_(a, b, beta=0, alpha=factor)


def _weigh(z: Tensor, g: Tensor | None, r: int) -> Tensor:
    """Return [g_0 z_U, g_1 z_n] in the shape of z, with anything finite in the columns beyond; dz of dh is the same."""
    if g is None:
        return z
    h, g = torch.empty_like(z), g.to(z.dtype)
    torch.mul(z[:, :r], g[:, :1], out=h[:, :r])
    torch.mul(z[:, r:], g[:, 1:], out=h[:, r:])
    return h


def keep_mask(x: Tensor, seed: int, dropout: float) -> Tensor | None:
    """Return a seed's dropout mask in x's shape and dtype, 1 where x is kept, or None.

    A 64-bit random number gives four elements. With a boolean mask, products on a CPU take four times as long.
    """
    if not dropout:
        return None
    generator = torch.Generator(x.device).manual_seed(seed)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    return torch.ge(numbers, round(dropout * 2**16) - 2**15, out=x.new_empty(x.shape))


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
