"""Mutual information between the universal and a task expert (Eq. 5) without ever making their outputs.

Variational information distillation (Ahn et al., CVPR 2019) maximises a Gaussian lower bound on I(U; D) with
q(U | D) = N(m D, diag(s^2)), the universal expert U the teacher and the task expert D the student:

    MIM(D, U) = mean over valid tokens t and channels c of  (U_tc - m_c D_tc)^2 / (2 s_c^2) + 1/2 log s_c^2

With U = B_U z_U and D = B_n z_n, where z are the experts' small inner products, U - m D = M z for z = [z_U; z_n] and
M = [B_U, -diag(m) B_n]. So the squared term summed over tokens is

    sum_t z_t' G z_t = trace(G S)   with   G = M' diag(1 / 2 s^2) M   and   S = sum_t z_t z_t'

both (r + r_e) x (r + r_e): nothing d_out-wide is made or kept for each token.

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
    z_universal: Tensor,
    z_task: Tensor,
    B_universal: Tensor,
    B_task: Tensor,
    scale: Tensor,
    variance: Tensor,
    valid: Tensor | None = None,
    *,
    detach_teacher: bool = True,
) -> Tensor:
    """Eq. (5) for one adapted layer, in at least fp32 also under autocast.

    ``*`` below is nothing for a batch of one task, or the rows of a batch whose rows have each their own task.

    Args:
        z_universal: A_U x, ``[*, T, r]``
        z_task: A_n x, ``[*, T, r_e]``
        B_universal: ``[*, d_out, r]``
        B_task: ``[*, d_out, r_e]``
        scale: m, ``[d_out]``
        variance: s^2, ``[d_out]``
        valid: True where a token counts, ``[*, T]``; by default every token counts
        detach_teacher: no gradient into ``z_universal`` and ``B_universal``

    Returns:
        a scalar, which may be negative (a log density); the log term alone where no token is valid.
    """
    if detach_teacher:
        z_universal, B_universal = z_universal.detach(), B_universal.detach()
    tokens: int | Tensor = z_task[..., 0].numel() if valid is None else valid.sum().clamp(min=1)
    with torch.autocast(z_task.device.type, enabled=False):
        S = gram_matrix(torch.cat([z_universal, z_task], -1), valid)
        return GramTerm(B_universal, B_task, scale, at_least_fp32(variance)).value(S, tokens)[0]


def gram_matrix(z: Tensor, valid: Tensor | None = None) -> Tensor:
    """S = sum over valid tokens of z z', in at least fp32: ``[*, T, k]`` -> ``[*, k, k]``."""
    z = at_least_fp32(z)
    if valid is not None:
        z = z * valid.unsqueeze(-1)
    return z.mT @ z


class GramTerm(NamedTuple):
    """Eq. (5) as a function of S: ``B_universal [*, d_out, r]``, ``B_task [*, d_out, r_e]``, m and s^2 ``[d_out]``."""

    B_universal: Tensor
    B_task: Tensor
    scale: Tensor
    variance: Tensor

    def difference_map(self) -> Tensor:
        """M = [B_U, -diag(m) B_n], ``[*, d_out, k]``: U - m D = M z."""
        scale = at_least_fp32(self.scale).unsqueeze(-1)
        return torch.cat([at_least_fp32(self.B_universal), at_least_fp32(self.B_task) * -scale], -1)

    def value(self, S: Tensor, tokens: int | Tensor) -> tuple[Tensor, Tensor]:
        """The term, a scalar, for S ``[*, k, k]`` over ``tokens`` valid tokens; and G ``[*, k, k]``."""
        M = self.difference_map()
        G = M.mT @ (M / (2 * self.variance).unsqueeze(-1))
        return (G * S).sum() / (tokens * self.variance.numel()) + self.variance.log().mean() / 2, G

    def gradients(self, d: Tensor, S: Tensor, G: Tensor, tokens: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradient by hand, of one task's term, times d.

        Returns:
            gradients of S ``[k, k]``, [B_U, B_n] ``[d_out, k]``, m and s^2 ``[d_out]``
        """
        M, r = self.difference_map(), self.B_universal.shape[-1]
        scale, variance = at_least_fp32(self.scale), self.variance
        share = d / (tokens * variance.numel())
        MS = M @ S
        d_variance = d / (2 * variance.numel() * variance) - share * (MS * M).sum(-1) / (2 * variance**2)
        dM = MS * (share / variance).unsqueeze(-1)
        dB = torch.cat([dM[:, :r], dM[:, r:] * -scale.unsqueeze(-1)], -1)
        return share * G, dB, -(dM[:, r:] * at_least_fp32(self.B_task)).sum(-1), d_variance


def at_least_fp32(x: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
