"""The Gram-matrix form of Eq. (5) against its definition, and the floor under its variance."""

from __future__ import annotations

import pytest
import torch

from lvlm_clorae.losses.mutual_information import (
    estimated_mutual_information,
    gaussian_variance,
    initial_rho,
    mutual_information,
)


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((11, 4), (11, 2), (6, 4), (6, 2), (6,))
    return [*(torch.randn(shape, dtype=dtype) for shape in shapes), torch.rand(6, dtype=dtype) + 0.1]


def term(z_u, z_n, B_u, B_n, m, variance, valid=None, **settings):
    z, B = torch.cat([z_u, z_n], -1), torch.cat([B_u, B_n], -1)
    return mutual_information(z, B, z_u.shape[-1], m, variance, valid, **settings)


def by_definition(z_u, z_n, B_u, B_n, m, variance, valid):
    U, D = z_u @ B_u.T, z_n @ B_n.T
    return ((U - m * D) ** 2 / (2 * variance) + variance.log() / 2)[valid].mean()


@pytest.mark.parametrize("valid", [torch.arange(11) < 11, torch.arange(11) % 3 == 0])
def test_gram_form_equals_the_definition(valid):
    tensors = inputs()
    torch.testing.assert_close(term(*tensors, valid), by_definition(*tensors, valid))
    assert valid.all() == torch.isclose(term(*tensors), term(*tensors, valid))


@pytest.mark.parametrize("valid", [torch.arange(11) < 11, torch.arange(11) % 3 == 0])
def test_the_estimate_from_every_token_is_the_definition(valid):
    z_u, z_n, B_u, B_n, m, variance = tensors = inputs()
    z, one_a_token = torch.cat([z_u, z_n], -1), [B.expand(11, -1, -1) for B in (B_u, B_n)]
    for B in ([B_u, B_n], one_a_token):
        found = estimated_mutual_information(z, *B, m, variance, valid, valid.sum(), 1.0)
        torch.testing.assert_close(found, by_definition(*tensors, valid))


def test_gradients():
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    valid = torch.arange(11) < 7
    assert torch.autograd.gradcheck(lambda *t: term(*t, valid, detach_teacher=False), leaves)
    teacher_free = [leaves[i] for i in (1, 3, 4, 5)]  # with a detached teacher the student's gradient is the same
    detached = torch.autograd.grad(term(*leaves, valid), teacher_free)
    whole = torch.autograd.grad(term(*leaves, valid, detach_teacher=False), teacher_free)
    torch.testing.assert_close(detached, whole)
    for teachers in torch.autograd.grad(term(*leaves, valid), [leaves[0], leaves[2]]):
        assert torch.count_nonzero(teachers) == 0


def test_no_valid_token_leaves_the_log_term():
    tensors = inputs()
    alone = term(*tensors, torch.zeros(11, dtype=torch.bool))
    torch.testing.assert_close(alone, tensors[-1].log().mean() / 2)


def test_variance_starts_at_one_and_never_falls_below_its_floor():
    for s_min in (0.01, 0.1, 0.9):
        rho = torch.tensor([initial_rho(s_min), -1e4], dtype=torch.float64)
        variance = gaussian_variance(rho, s_min)
        torch.testing.assert_close(variance, torch.tensor([1.0, s_min**2], dtype=torch.float64))
    assert gaussian_variance(torch.zeros(1, dtype=torch.bfloat16), 0.1).dtype == torch.float32
