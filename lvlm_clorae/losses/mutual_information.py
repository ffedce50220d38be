"""Mutual information between the universal and a task expert (Eq. 5), from second moments.

Variational information distillation (Ahn et al., CVPR 2019) maximizes a Gaussian lower bound on I(U; D). With
q(U | D) = N(m D, diag(s^2)), the universal expert U as teacher and the task expert D as student,

    MIM(D, U) = mean over valid tokens t of  sum over channels c of  (U_tc - m_c D_tc)^2 / (2 s_c^2) + 1/2 log s_c^2

With U = B_U z_U and D = B_n z_n, where z = [z_U; z_n] are the experts' inner products, U - m D = M z for
M = [B_U, -diag(m) B_n]. So the squared differences summed over tokens are quadratic forms in one small matrix,

    sum_t (U_tc - m_c D_tc)^2 = M_c S M_c'   with   S = sum_t z_t z_t'   [k, k],  k = r + r_e

and no tensor of d_out values per token is needed.

The bound is degenerate where B = 0: the squared term vanishes, and a smaller s lowers the log term. Hence
s^2 = softplus(rho) + s_min^2: at the default s_min = 0.1 the weight of a squared difference is at most 50, and a
channel gains at most log 10 from a small s. At the start s^2 = 1 (:func:`initial_rho`), so the term is exactly zero.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def initial_rho(s_min: float) -> float:
    """Return the rho for which softplus(rho) + s_min^2 = 1."""
    return math.log(math.expm1(1.0 - s_min**2))


def second_moment(z: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return S, the sum of z z' over valid tokens, in at least fp32, from ``z [*, T, k]`` and ``valid [*, T]``."""
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_fp32(z)
        return (z if valid is None else z * valid.unsqueeze(-1)).mT @ z


def mutual_information(
    S: Tensor,
    B_U: Tensor,
    B_n: Tensor,
    m: Tensor,
    rho: Tensor,
    tokens: Tensor,
    *,
    s_min: float,
    detach_teacher: bool = True,
) -> Tensor:
    """Return Eq. (5) of L adapted layers, ``[L]``, in at least fp32 also under autocast.

    Args:
        S: second moments, one per task in the batch, ``[L, n, k, k]``; with a detached teacher, of z_U detached.
        B_U, B_n: ``[L, d_out, r]``, and of these n tasks ``[L, n, d_out, k - r]``.
        m, rho: ``[L, d_out]``
        tokens: number of valid tokens, ``[L]``; a layer without any has the log term alone.
        s_min: floor of s.
        detach_teacher: no gradient to the universal expert.
    """
    with torch.autocast(S.device.type, enabled=False):
        r, U = B_U.shape[-1], at_least_fp32(B_U)
        D = at_least_fp32(B_n) * at_least_fp32(m)[:, None, :, None]
        S_U, S_UD, S_D = S[..., :r, :r].sum(1), S[..., :r, r:], S[..., r:, r:]
        if detach_teacher:
            U, S_U = U.detach(), S_U.detach()
        squares = ((U @ S_U) * U).sum(-1) + ((D @ S_D - 2 * (U.unsqueeze(1) @ S_UD)) * D).sum((1, -1))
        variance = functional.softplus(at_least_fp32(rho)) + s_min**2
        return (squares / (2 * variance)).sum(-1) / tokens.clamp(min=1) + variance.log().sum(-1) / 2


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert fp16 and bf16 to fp32; keep fp32 and fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
