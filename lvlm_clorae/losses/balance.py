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


def token_sums(gates: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the sum over each sample's tokens ``[B, E]`` of the softmax over the experts ``[B, ..., E]``.

    ``valid`` is True for the tokens that count, ``[B, ...]``, None if all do; gates of one packed row have its length.
    """
    counted = gates if valid is None else gates * valid.unsqueeze(-1)
    return counted.reshape(len(counted), -1, gates.shape[-1]).sum(1)


def importance(sums: Tensor, own: Tensor, delta: float) -> Tensor:
    """Return Z ``[..., B, E]`` from :func:`token_sums`.

    ``own`` is True where the expert's group is the sample's task, ``[..., B, E]`` or a shape that expands to it.
    """
    return sums * (1.0 + delta * (2.0 * own.to(sums.dtype) - 1.0))


def moments(Z: Tensor) -> Tensor:
    """Return the sum, the sum of squares and the number of the elements of Z ``[..., B, E]``, ``[..., 3]``.

    Ranks can add them up. In float64, since the variance is a small difference of them.
    """
    Z = Z.double().flatten(-2)
    number = torch.full(Z.shape[:-1], Z.shape[-1], dtype=Z.dtype, device=Z.device)
    return torch.stack([Z.sum(-1), Z.square().sum(-1), number], -1)


def balance(moments: Tensor) -> Tensor:
    """Return the loss of each layer from its moments: ``[L, 3]`` -> ``[L]``."""
    total, squares, number = moments.unbind(-1)
    mean = total / number
    variance = (squares - total * mean) / (number - 1).clamp(min=1)
    return variance.clamp(min=0) / (mean.square() + EPSILON)
