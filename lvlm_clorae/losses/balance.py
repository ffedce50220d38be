"""LoRAMoE's localized balancing loss (Dou et al., ACL 2024), as its released code computes it.

Z[b, i] is the sum over the tokens of sample b of the router's weight for expert i, times 1 + delta where the expert's
group is that of the sample's task, else 1 - delta. The loss of a layer is the squared coefficient of variation over all
elements of the matrix [samples, experts],

    var(Z) / (mean(Z)^2 + eps)

with the unbiased variance, and that of a model the sum over its layers. Padding tokens are excluded here. The released
code includes them, but its script has one sample per micro-batch, hence no padding.
"""

import torch
from torch import Tensor

EPSILON = 1e-10


def importance(gates: Tensor, own: Tensor, delta: float, valid: Tensor | None = None) -> Tensor:
    """Return Z ``[B, E]`` from the softmax over the experts ``[B, ..., E]``.

    ``own`` is True where the expert's group is the sample's task, ``[E]`` or ``[B, E]``; ``valid`` for the tokens that
    count, ``[B, ...]``, None if all do.
    """
    counted = gates if valid is None else gates * valid.unsqueeze(-1)
    sums = counted.reshape(len(gates), -1, gates.shape[-1]).sum(1)
    return sums * (1.0 + delta * (2.0 * own.to(sums.dtype) - 1.0))


def moments(Z: Tensor) -> Tensor:
    """Return the sum, the sum of squares and the number of the elements, ``[3]``, which ranks can add up.

    In float64, since the variance is a small difference of these.
    """
    Z = Z.double()
    return torch.stack([Z.sum(), Z.square().sum(), Z.new_full((), Z.numel())])


def balance(moments: Tensor) -> Tensor:
    """Return the loss of each layer from its moments: ``[L, 3]`` -> ``[L]``."""
    total, squares, number = moments.unbind(-1)
    mean = total / number
    variance = (squares - total * mean) / (number - 1).clamp(min=1)
    return variance.clamp(min=0) / (mean.square() + EPSILON)
