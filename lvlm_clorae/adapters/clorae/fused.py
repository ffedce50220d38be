"""The C-LoRAE layer for one task a batch as one autograd function: the equations' products, and little made or kept.

With x' the dropped x, z = [A_U; A_n] x', s = alpha / r and g the gate's weight of the task expert, for every token

    forward     y += [B_U, B_n] h         h = s [(1 - g) z_U; g z_n]         in the base layer's own output
    backward    dh = [B_U, B_n]' dy       d[B_U, B_n] = sum dy h'
                dz = s [(1 - g) dh_U; g dh_n] + dMIM/dz                      d[A_U; A_n] = sum dz x''
                dg = s (z_n' dh_n - z_U' dh_U)                               dx = dropped([A_U; A_n]' dz) + dg/dx

Tokens are columns here: z, h and dz lie as [k, T], and [B_U, B_n] as its transpose. So rows are as long as d_in, d_out
and T are, and k, which is 171 or 85 at the paper's ranks, is never what memory is read along: fast products need no
padding of it. Rows as long as a power of two would fall on the same few sets of a cache, so they lie a little apart.

A softmax of two logits is the sigmoid of their difference, so the gate is one row, w = W_g[1] - W_g[0], a row more of A
where nothing is dropped. Kept for backward are x, which is there anyway, g, and what the MIM term needs: the student's
columns of S [k, k] and a number a channel. The dropout mask is made again from its seed. Where nothing is dropped the
base layer takes dz into its own gradient of x (see :class:`InputTap`), and z is made again unless it is small beside x;
under dropout, where plain LoRA keeps a second x and a mask, z is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lvlm_clorae.adapters.inplace import InputTap, add_product_, alias
from lvlm_clorae.losses.mutual_information import (
    at_least_fp32,
    count_valid,
    difference_map,
    gaussian_term,
    gaussian_variance,
    second_moment,
    squared_gaps,
    term_gradients,
)


class FusedSettings(NamedTuple):
    """All that is no tensor."""

    task: int | None
    r: int
    """Rank of the universal expert, 0 without one."""
    scaling: float
    dropout: float
    dtype: torch.dtype
    """Of the products."""
    with_mim: bool
    s_min: float
    detach_teacher: bool
    frozen: bool
    """The task's expert gets no gradient."""


class Parameters(NamedTuple):
    """The parameters of :class:`CLoRAEExperts`, None where an ablation has them not."""

    universal_A: Tensor | None
    universal_B: Tensor | None
    expert_A: Tensor | None
    expert_B: Tensor | None
    gate: Tensor | None
    mim_scale: Tensor | None
    mim_rho: Tensor | None

    def joined(self, s: FusedSettings) -> tuple[Tensor, Tensor, Tensor | None]:
        """[A_U; A_n] ``[K, d_in]``, [B_U, B_n]' ``[k, d_out]`` and w ``[d_in]``.

        Where nothing is dropped K is k + 1, and the last row of A is w. Under dropout K is k, and A is divided by the
        share that stays, so that x need not be.
        """
        A = [A for A in (self.universal_A, None if s.task is None else self.expert_A[s.task]) if A is not None]  # type: ignore[index]
        B = [B for B in (self.universal_B, None if s.task is None else self.expert_B[s.task]) if B is not None]  # type: ignore[index]
        w = None if self.gate is None else (self.gate[1] - self.gate[0]).to(s.dtype)
        if w is not None and not s.dropout:
            A.append(w.unsqueeze(0))
        joined_A = torch.cat([part.to(s.dtype) for part in A])
        if s.dropout:
            joined_A /= 1 - s.dropout
        joined_B = _apart(joined_A, sum(part.shape[1] for part in B), B[0].shape[0])
        for rows, part in zip(joined_B.split([part.shape[1] for part in B]), B, strict=True):
            rows.copy_(part.T)
        return joined_A, joined_B, w

    def rank(self, s: FusedSettings) -> int:
        """k: the rank of both experts together."""
        return s.r + (0 if s.task is None else self.expert_A.shape[1])  # type: ignore[union-attr]

    def variance(self, s: FusedSettings) -> Tensor:
        """s^2 ``[d_out]``."""
        assert self.mim_rho is not None
        return gaussian_variance(self.mim_rho, s.s_min)


def add_experts(
    output: Tensor,
    x: Tensor,
    experts: nn.Module,
    valid: Tensor | None,
    drawn: Tensor | None,
    settings: FusedSettings,
    tap: InputTap | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``output += delta`` in place.

    Returns:
        the output; the MIM term of all tokens, the gate's weights ``[B, ..., 1]`` and z of the tokens at ``drawn [n]``,
        ``[n, k]``, or None.
    """
    # The seed comes from the CPU's generator: no device is asked, and a checkpoint's restored state repeats the mask.
    seed = int(torch.randint(2**62, ())) if settings.dropout else 0
    parameters = [getattr(experts, name, None) for name in Parameters._fields]
    if not output.requires_grad:  # the base layer's backward will not run
        tap = None
    return _AddExperts.apply(output, x, valid, drawn, seed, settings, tap, *parameters)


class _AddExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        valid: Tensor | None,
        drawn: Tensor | None,
        seed: int,
        s: FusedSettings,
        tap: InputTap | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        parameters = Parameters(*tensors)
        k = parameters.rank(s)
        with torch.autocast(x.device.type, enabled=False):
            A, B, w = parameters.joined(s)
            tokens = x.reshape(-1, x.shape[-1]).to(s.dtype)
            z = _product(A, _drop(tokens, _kept(tokens, seed, s)).T)
            g = None
            if w is not None:
                g = at_least_fp32(tokens @ w if s.dropout else z[k]).sigmoid()
            h = _weigh(z, g, k, s)
            output = alias(output)
            add_product_(output, h.T, B.T)
            mim = q = teacher = student = None
            if s.with_mim:
                assert parameters.mim_scale is not None
                S = second_moment(z[:k].T, s.r, None if valid is None else valid.flatten())
                q = squared_gaps(difference_map(B.T, s.r, parameters.mim_scale), S)
                teacher, student = None if s.detach_teacher else S.teacher, S.student
                mim = gaussian_term(q, parameters.variance(s), count_valid(z.shape[1], valid))
        kept_z = z if _keeps_z(x, k, s) else None
        ctx.save_for_backward(x, valid, drawn, g, kept_z, teacher, student, q, *tensors)
        ctx.seed, ctx.settings, ctx.tap = seed, s, tap
        weight = None if g is None else g.reshape(*x.shape[:-1], 1)
        if weight is not None:
            ctx.mark_non_differentiable(weight)
        return output, mim, weight, None if drawn is None else z[:k, drawn].T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor, dmim: Tensor | None, _: Any, dz_drawn: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, valid, drawn, g, z, teacher, student, q, *tensors = ctx.saved_tensors
        s, parameters = ctx.settings, Parameters(*tensors)
        k = parameters.rank(s)
        with torch.autocast(x.device.type, enabled=False):
            A, B, w = parameters.joined(s)
            tokens = x.reshape(-1, x.shape[-1]).to(s.dtype)
            kept = _kept(tokens, ctx.seed, s)
            dropped = _drop(tokens, kept)
            if z is None:
                z = _product(A, dropped.T)
            rows = dy.reshape(-1, dy.shape[-1]).to(s.dtype)

            dh = _product(B, rows.T)
            dB = _product(_weigh(z, g, k, s), rows)
            dz = _apart(z, *z.shape)
            _weigh(dh, g, k, s, out=dz[:k])
            dscale = drho = None
            if student is not None and dmim is not None:
                assert parameters.mim_scale is not None
                assert parameters.mim_rho is not None
                variance, count = parameters.variance(s), count_valid(z.shape[1], valid)
                term = term_gradients(dmim, B.T, s.r, parameters.mim_scale, variance, student, teacher, q, count)
                first = s.r if teacher is None else 0  # the teacher's rows come first
                counted = z[:k] if valid is None else z[:k] * valid.flatten()
                dz[first:k].addmm_(term.z.T.to(z.dtype), counted)
                dB[first:] += term.B.T.to(dB.dtype)
                dscale, drho = term.scale, term.variance * torch.sigmoid(at_least_fp32(parameters.mim_rho))  # softplus'
            if drawn is not None and dz_drawn is not None:
                dz[:k, drawn] += dz_drawn.T
            d_logit = None if g is None else _gate_gradient(z, dh, g, k, s)
            if d_logit is not None and not s.dropout:
                dz[k] = d_logit
            dA, dx, dw = dz @ dropped, None, None
            if s.dropout:
                dA /= 1 - s.dropout
            if d_logit is not None:
                dw = d_logit @ tokens if s.dropout else dA[k]
            if ctx.tap is not None:
                ctx.tap.part = dz.T, A
            elif ctx.needs_input_grad[1]:
                dx = _drop(dz.T @ A, kept)
                if s.dropout and d_logit is not None and w is not None:
                    dx.addr_(d_logit, w)
                dx = dx.view(x.shape).to(x.dtype)
        dA_universal, dA_experts = _by_expert(dA[:k], parameters.universal_A, parameters.expert_A, 0, s)
        dB_universal, dB_experts = _by_expert(dB.T, parameters.universal_B, parameters.expert_B, 1, s)
        dgate = None if dw is None else torch.stack([-dw, dw])
        gradients = Parameters(dA_universal, dB_universal, dA_experts, dB_experts, dgate, dscale, drho)
        cast = [None if d is None or p is None else d.to(p.dtype) for d, p in zip(gradients, tensors, strict=True)]
        return dy, dx, None, None, None, None, None, *cast


def _apart(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty matrix whose rows do not follow each other at once; all begin at multiples of 32 elements."""
    return like.new_empty(rows, columns + -columns % 32 + 32)[:, :columns]


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=_apart(a, a.shape[0], b.shape[1]))


def _weigh(z: Tensor, g: Tensor | None, k: int, s: FusedSettings, out: Tensor | None = None) -> Tensor:
    """s [(1 - g) z_U; g z_n] ``[k, T]``: of z in forward, of dh in backward."""
    h = _apart(z, k, z.shape[1]) if out is None else out
    if g is None:
        return torch.mul(z[:k], s.scaling, out=h)
    weight = (s.scaling * g).to(z.dtype)
    torch.mul(z[: s.r], s.scaling - weight, out=h[: s.r])
    torch.mul(z[s.r : k], weight, out=h[s.r :])
    return h


def _gate_gradient(z: Tensor, dh: Tensor, g: Tensor, k: int, s: FusedSettings) -> Tensor:
    """Gradient of the gate's logit ``[T]``."""
    products = at_least_fp32(z[:k] * dh)
    dg = products[s.r :].sum(0) - products[: s.r].sum(0)
    return (s.scaling * dg * g * (1 - g)).to(z.dtype)


def _by_expert(
    d: Tensor, universal: Tensor | None, experts: Tensor | None, dim: int, s: FusedSettings
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of both experts' joined matrix, given to each; an absent or frozen expert's is zero."""
    d_universal, d_task = d.tensor_split([s.r], dim)
    if experts is None:
        return d_universal, None
    d_experts = torch.zeros_like(experts)
    if not s.frozen:
        d_experts[s.task] = d_task
    return (None if universal is None else d_universal), d_experts


def _kept(tokens: Tensor, seed: int, s: FusedSettings) -> Tensor | None:
    return keep_mask(tokens, seed, s.dropout) if s.dropout else None


def keep_mask(x: Tensor, seed: int, dropout: float) -> Tensor:
    """The dropout mask of ``seed`` in x's shape, True where x stays; four elements from one 64-bit random number."""
    generator = torch.Generator(x.device).manual_seed(seed)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: x.numel()].view(x.shape) >= round(dropout * 2**16) - 2**15


def _drop(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x * kept


def _keeps_z(x: Tensor, k: int, s: FusedSettings) -> bool:
    """Whether z is kept for backward: under dropout, and where it is small beside x, else it is made again."""
    return s.dropout > 0 or 32 * k <= x.shape[-1]
