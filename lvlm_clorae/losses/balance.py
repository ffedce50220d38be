"""LoRAMoE's localised balancing loss (Dou et al., ACL 2024): experts of a sample's own type should do more for it.

The importance of expert i is the sum over valid tokens of its gate, times 1 + delta where the expert's group is that of
the token's task, times 1 - delta where it is not. With Z the E experts' importances,

    loss = var(Z) / (mean(Z)^2 + eps)

with the population variance (over E, not E - 1). Equal weighted importances give zero: each type's tokens then have to
lean on the experts of the other groups a little more the larger delta is, so the gate must learn who is who.
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-10


def importance(gates: Tensor, own: Tensor, delta: float, valid: Tensor | None = None) -> Tensor:
    """Z ``[E]``.

    Args:
        gates: softmax over experts, ``[..., E]``
        own: True where the expert's group is the token's, broadcastable to ``gates``
        delta: in [0, 1)
        valid: True where a token counts, ``[...]``; by default every token counts
    """
    weighted = gates * (1.0 + delta * (2.0 * own.to(gates.dtype) - 1.0))
    if valid is not None:
        weighted = weighted * valid.unsqueeze(-1)
    return weighted.flatten(0, -2).sum(0)


def balance(Z: Tensor) -> Tensor:
    """var(Z) / (mean(Z)^2 + eps) over the last dimension: ``[..., E]`` -> ``[...]``."""
    return Z.var(-1, unbiased=False) / (Z.mean(-1).square() + EPSILON)
