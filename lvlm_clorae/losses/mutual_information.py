"""Mutual information between the universal and a task expert (Eq. 5) without ever making their outputs.

Variational information distillation (Ahn et al., CVPR 2019) maximises a Gaussian lower bound on I(U; D) with
q(U | D) = N(m D, diag(s^2)), the universal expert U the teacher and the task expert D the student:

    MIM(D, U) = mean over valid tokens t and channels c of  (U_tc - m_c D_tc)^2 / (2 s_c^2) + 1/2 log s_c^2

With U = B_U z_U and D = B_n z_n, where z are the experts' small inner products, U - m D = M z for z = [z_U; z_n] and
M = [B_U, -diag(m) B_n]. So the squared gap of a channel, summed over tokens, is a quadratic form in one small matrix:

    q_c = sum_t (U_tc - m_c D_tc)^2 = M_c S M_c'   with   S = sum_t z_t z_t'   [k, k],  k = r + r_e

and what it gives to z is 2 G z with the Gram matrix G = M' diag(1 / 2 s^2) M, as small: nothing d_out-wide is made or
kept for each token. S and G are symmetric: only the blocks that are needed are made (:class:`SecondMoment`).

The bound can be gamed: B starts at zero, so both experts are zero, the squared term vanishes, and shrinking s lowers
the log term for nothing; later it turns an already small gap into a huge weight. Hence s^2 = softplus(rho) + s_min^2,
with s_min = 0.1 by default: a squared gap never weighs more than 1 / (2 s_min^2) = 50 and a channel never gains more
than log 10 = 2.3 from certainty alone. :func:`initial_rho` makes s^2 start at one, so that the term starts at exactly
zero and the squared gap at VID's plain weight of one half.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def initial_rho(s_min: float) -> float:
    """The rho with softplus(rho) + s_min^2 = 1."""
    return math.log(math.expm1(1.0 - s_min**2))


def gaussian_variance(rho: Tensor, s_min: float) -> Tensor:
    """s^2 = softplus(rho) + s_min^2 a channel, in at least fp32: ``[d_out]`` -> ``[d_out]``."""
    return functional.softplus(at_least_fp32(rho)) + s_min**2


def mutual_information(
    z: Tensor,
    B: Tensor,
    r: int,
    scale: Tensor,
    variance: Tensor,
    valid: Tensor | None = None,
    *,
    detach_teacher: bool = True,
) -> Tensor:
    """Eq. (5) for one adapted layer, in at least fp32 also under autocast.

    ``*`` below is nothing for a batch of one task, or the rows of a batch whose rows have each their own task.

    Args:
        z: [A_U; A_n] x, ``[*, T, k]``
        B: [B_U, B_n], ``[*, d_out, k]``
        r: the universal expert's rank: how many of the k are its
        scale: m, ``[d_out]``
        variance: s^2, ``[d_out]``
        valid: True where a token counts, ``[*, T]``; by default every token counts
        detach_teacher: no gradient into the universal expert's part of z and B

    Returns:
        a scalar, which may be negative (a log density); the log term alone where no token is valid.
    """
    if detach_teacher:
        z, B = (torch.cat([part[..., :r].detach(), part[..., r:]], -1) for part in (z, B))
    tokens = count_valid(z[..., 0].numel(), valid)
    with torch.autocast(z.device.type, enabled=False):
        q = squared_gaps(difference_map(B, r, scale), second_moment(z, r, valid))
        q = q if q.dim() == 1 else q.sum(0)
        return gaussian_term(q, at_least_fp32(variance), tokens)


class SecondMoment(NamedTuple):
    """S = sum over valid tokens of z z', in two blocks; the third is the student's first r rows, transposed."""

    teacher: Tensor
    """S_UU, ``[*, r, r]``"""
    student: Tensor
    """[S_UD; S_DD], ``[*, k, k - r]``"""


def second_moment(z: Tensor, r: int, valid: Tensor | None = None) -> SecondMoment:
    """S of ``z [*, T, k]``, in at least fp32."""
    z = at_least_fp32(z)
    counted = z if valid is None else z * valid.unsqueeze(-1)
    return SecondMoment(counted[..., :r].mT @ z[..., :r], counted.mT @ z[..., r:])


def difference_map(B: Tensor, r: int, scale: Tensor) -> Tensor:
    """M = [B_U, -diag(m) B_n], in at least fp32, ``[*, d_out, k]``."""
    B = at_least_fp32(B)
    return torch.cat([B[..., :r], B[..., r:] * -at_least_fp32(scale).unsqueeze(-1)], -1)


def squared_gaps(M: Tensor, S: SecondMoment) -> Tensor:
    """q: ``[*, d_out]``."""
    r = S.teacher.shape[-1]
    U, D = M[..., :r], M[..., r:]
    both, own = U @ S.student[..., :r, :], D @ S.student[..., r:, :]
    return ((U @ S.teacher) * U).sum(-1) + ((2 * both + own) * D).sum(-1)


def gaussian_term(q: Tensor, variance: Tensor, tokens: int | Tensor) -> Tensor:
    """The term, a scalar, from the squared gaps over ``tokens`` valid tokens, q and s^2 ``[d_out]``."""
    return (q / (2 * variance)).sum() / (tokens * len(variance)) + variance.log().mean() / 2


def estimated_mutual_information(
    z: Tensor,
    B_U: Tensor,
    B_n: Tensor,
    scale: Tensor,
    variance: Tensor,
    counted: Tensor | None,
    tokens: int | Tensor,
    weight: float,
    *,
    detach_teacher: bool = True,
) -> Tensor:
    """Eq. (5) for one adapted layer as it is printed, from a few tokens alone, and as it is on average over draws.

    Where each token is as likely to be drawn as any other, ``weight`` times the sum over those that are drawn is, on
    average, the sum over all. Only the squared gaps are estimated; the log term and the count are exact.

    Args:
        z: [A_U; A_n] x of the n drawn tokens, ``[n, k]``
        B_U: ``[d_out, r]``, or one a token ``[n, d_out, r]``
        B_n: ``[d_out, k - r]``, or one a token ``[n, d_out, k - r]``
        scale: m, ``[d_out]``
        variance: s^2, ``[d_out]``
        counted: True where a drawn token is valid, ``[n]``; by default every one is
        tokens: how many of all tokens are valid
        weight: how many tokens a drawn one stands for: all by those that are drawn
        detach_teacher: no gradient into the universal expert's part of z and B

    Returns:
        a scalar, in at least fp32 also under autocast.
    """
    with torch.autocast(z.device.type, enabled=False):
        z_U, z_n = at_least_fp32(z).tensor_split([B_U.shape[-1]], -1)
        B_U, B_n = at_least_fp32(B_U), at_least_fp32(B_n)
        if detach_teacher:
            z_U, B_U = z_U.detach(), B_U.detach()
        gaps = (_outputs(z_U, B_U) - at_least_fp32(scale) * _outputs(z_n, B_n)).square()
        q = weight * (gaps if counted is None else gaps * counted.unsqueeze(-1)).sum(0)
        return gaussian_term(q, at_least_fp32(variance), tokens)


def _outputs(z: Tensor, B: Tensor) -> Tensor:
    """B z of each token, ``[n, d_out]``."""
    return z @ B.mT if B.dim() == 2 else (B @ z.unsqueeze(-1)).squeeze(-1)


class TermGradients(NamedTuple):
    """Gradients of the term; ``student`` are the columns from r on, or all where the teacher is not detached."""

    z: Tensor
    """What z of the valid tokens is multiplied by to give its gradient's student columns, ``[k, student]``."""
    B: Tensor
    """``[d_out, student]``"""
    scale: Tensor
    variance: Tensor


def term_gradients(
    d: Tensor,
    B: Tensor,
    r: int,
    scale: Tensor,
    variance: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    q: Tensor,
    tokens: int | Tensor,
) -> TermGradients:
    """The gradients by hand, for a batch of one task, times d; ``teacher`` is None where the teacher is detached."""
    M, m = difference_map(B, r, scale), at_least_fp32(scale)
    share = d / (tokens * len(variance))
    weight = (share / variance).unsqueeze(-1)
    d_student = (M @ student) * weight
    d_scale = -(d_student * B[:, r:]).sum(-1)
    d_variance = d / (2 * len(variance) * variance) - share * q / (2 * variance.square())
    dB = d_student * -m.unsqueeze(-1)
    if teacher is None:
        return TermGradients(M.T @ (M[:, r:] * weight), dB, d_scale, d_variance)
    d_teacher = (M @ torch.cat([teacher, student[:r].T])) * weight
    return TermGradients(M.T @ (M * weight), torch.cat([d_teacher, dB], 1), d_scale, d_variance)


def count_valid(total: int, valid: Tensor | None) -> int | Tensor:
    """How many of all tokens count, at least one; no synchronisation."""
    return total if valid is None else valid.sum().clamp(min=1)


def at_least_fp32(x: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
