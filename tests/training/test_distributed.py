"""Support for DeepSpeed's engine."""

from __future__ import annotations

import torch
from torch import nn

from lvlm_clorae.training import distributed


class Rotary(nn.Module):
    """A linear layer and the buffers of a rotary embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("inv_freq", 10000 ** -torch.linspace(0, 1, 8), persistent=False)
        self.register_buffer("count", torch.tensor(3))


def test_fp32_buffers_keep_their_precision() -> None:
    model = Rotary()
    expected = model.inv_freq.clone()
    with distributed.buffers_kept(model):
        model.bfloat16()  # as DeepSpeed 0.17 does to the whole model
    assert model.linear.weight.dtype == torch.bfloat16
    assert torch.equal(model.inv_freq, expected)
    assert model.count == 3
