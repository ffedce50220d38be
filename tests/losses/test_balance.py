"""LoRAMoE's balancing loss against the formula of the released code, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.losses.balance import balance, importance, moments, token_sums


def released_formula(gates: torch.Tensor, tasks: torch.Tensor, delta: float) -> torch.Tensor:
    """The loss of one layer after the authors' peft/tuners/lora.py (github.com/Ablustrund/LoRAMoE), for two task types.

    Samples of type 1 belong to the first half of the experts, those of type 0 to the second half. All elements of the
    weighted matrix [samples, experts] enter one squared coefficient of variation.
    """
    samples, experts = gates.shape[0], gates.shape[2]
    factors = torch.full((samples, experts), 1.0 - delta, dtype=gates.dtype)
    for sample, task in enumerate(tasks.tolist()):
        half = slice(0, experts // 2) if task == 1 else slice(experts // 2, experts)
        factors[sample, half] = 1.0 + delta
    values = (gates.sum(dim=1) * factors).flatten()
    return values.var(unbiased=True) / (values.mean() ** 2 + 1e-10)


def ours(gates: torch.Tensor, tasks: torch.Tensor, delta: float) -> torch.Tensor:
    groups = torch.tensor([1, 0]).repeat_interleave(gates.shape[-1] // 2)
    return balance(moments(importance(token_sums(gates), groups == tasks.unsqueeze(-1), delta)))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tasks=st.lists(st.integers(0, 1), min_size=1, max_size=8),
    half=st.integers(1, 4),
    delta=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_equals_the_released_formula_with_its_gradient(seed, tasks, half, delta):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(tasks), 5, 2 * half, generator=generator, dtype=torch.float64, requires_grad=True)
    found, expected = (loss(logits.softmax(-1), torch.tensor(tasks), delta) for loss in (ours, released_formula))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


def test_one_task_for_the_batch_equals_the_released_formula():
    gates = torch.randn(3, 7, 4, dtype=torch.float64).softmax(-1)
    own = torch.tensor([True, True, False, False])
    found = balance(moments(importance(token_sums(gates), own, 0.2)))
    torch.testing.assert_close(found, released_formula(gates, torch.ones(3, dtype=torch.long), 0.2))


def test_even_router_on_two_tasks_is_not_zero():
    """4 + 4 samples of two tasks: the expert sums over the batch are equal, the elements are not."""
    gates = torch.full((8, 6, 4), 0.25, dtype=torch.float64)
    loss = ours(gates, torch.tensor([0] * 4 + [1] * 4), 0.1)
    torch.testing.assert_close(loss, torch.tensor(0.01 * 32 / 31, dtype=torch.float64))


def test_padding_tokens_do_not_count():
    gates = torch.randn(2, 5, 4).softmax(-1)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) != 0
    found = token_sums(gates, valid)
    torch.testing.assert_close(found[0], token_sums(gates[:1, :3])[0])
    torch.testing.assert_close(found[1], token_sums(gates[1:])[0])


def test_moments_of_parts_add_up():
    Z = torch.rand(6, 4)
    whole, parts = balance(moments(Z)), balance(moments(Z[:2]) + moments(Z[2:]))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("Z", [torch.zeros(3, 2), torch.ones(3, 2), torch.ones(1, 1)])
def test_equal_elements_give_zero(Z):
    assert balance(moments(Z)) == 0
