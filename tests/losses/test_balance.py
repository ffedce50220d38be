"""LoRAMoE's balancing loss on gates worked out by hand."""

from __future__ import annotations

import torch

from lvlm_clorae.losses.balance import balance, importance


def test_importance_of_three_tokens():
    gates = torch.tensor([[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]])
    own = torch.tensor([True, False])
    torch.testing.assert_close(importance(gates, own, 0.1), torch.tensor([1.7 * 1.1, 1.3 * 0.9]))
    valid = torch.tensor([True, True, False])
    torch.testing.assert_close(importance(gates, own, 0.0, valid), torch.tensor([0.7, 1.3]))
    rows = torch.tensor([[True, False], [False, True], [True, False]])
    torch.testing.assert_close(importance(gates, rows, 0.5), torch.tensor([2.25 + 0.1, 0.25 + 1.2]))


def test_gradients():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    own = torch.tensor([[[True, False, False, True]], [[False, True, False, False]]])  # a row's own experts
    valid = torch.tensor([[1, 1, 0], [1, 1, 1]]) != 0
    assert torch.autograd.gradcheck(lambda t: balance(importance(t.softmax(-1), own, 0.3, valid)), logits)


def test_balance_is_the_squared_coefficient_of_variation():
    torch.testing.assert_close(balance(torch.tensor([[1.0, 3.0], [2.0, 2.0]])), torch.tensor([0.25, 0.0]))
    assert balance(torch.zeros(3)) == 0  # no valid token: no division by zero
