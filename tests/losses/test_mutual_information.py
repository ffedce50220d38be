"""The second-moment form of Eq. (5) against its definition, and the floor of its variance."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lvlm_clorae.losses.mutual_information import at_least_fp32, initial_rho, mutual_information, second_moment

T, D_OUT, R, R_E, S_MIN = 11, 6, 4, 2, 0.1


def inputs() -> list[torch.Tensor]:
    """z_U, z_n, B_U, B_n, m and rho of one layer and task."""
    torch.manual_seed(0)
    shapes = ((T, R), (T, R_E), (D_OUT, R), (D_OUT, R_E), (D_OUT,), (D_OUT,))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def term(z_u, z_n, B_u, B_n, m, rho, valid=None, detach_teacher=True):
    z = torch.cat([z_u.detach() if detach_teacher else z_u, z_n], -1)
    tokens = torch.tensor(T) if valid is None else valid.sum()
    tensors = [tensor.unsqueeze(0) for tensor in (second_moment(z, valid)[None], B_u, B_n[None], m, rho, tokens)]
    return mutual_information(*tensors, s_min=S_MIN, detach_teacher=detach_teacher)[0]


def definition(z_u, z_n, B_u, B_n, m, rho, valid):
    U, D = z_u @ B_u.T, z_n @ B_n.T
    variance = functional.softplus(rho) + S_MIN**2
    return ((U - m * D) ** 2 / (2 * variance) + variance.log() / 2).sum(-1)[valid].mean()


@pytest.mark.parametrize("valid", [torch.arange(T) < T, torch.arange(T) % 3 == 0])
def test_equals_the_definition(valid):
    tensors = inputs()
    torch.testing.assert_close(term(*tensors, valid), definition(*tensors, valid))
    assert valid.all() == torch.isclose(term(*tensors), term(*tensors, valid))


def test_gradients():
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    valid = torch.arange(T) < 7
    assert torch.autograd.gradcheck(lambda *t: term(*t, valid, detach_teacher=False), leaves)
    student = [leaves[i] for i in (1, 3, 4, 5)]  # its gradients are the same with a detached teacher
    detached = torch.autograd.grad(term(*leaves, valid), student)
    whole = torch.autograd.grad(term(*leaves, valid, detach_teacher=False), student)
    torch.testing.assert_close(detached, whole)
    teacher = torch.autograd.grad(term(*leaves, valid), [leaves[0], leaves[2]], allow_unused=True)
    assert teacher == (None, None)


def test_several_layers_and_tasks_are_computed_together():
    """Two layers, with the tokens of two tasks each."""
    torch.manual_seed(1)
    z = torch.randn(2, 2, T, R + R_E, dtype=torch.float64)
    B_u, B_n = torch.randn(2, D_OUT, R, dtype=torch.float64), torch.randn(2, 2, D_OUT, R_E, dtype=torch.float64)
    m, rho = torch.randn(2, 2, D_OUT, dtype=torch.float64)
    tokens = torch.full((2,), 2.0 * T)
    found = mutual_information(second_moment(z), B_u, B_n, m, rho, tokens, s_min=S_MIN)
    for layer in range(2):
        tasks = [
            definition(*z[layer, n].split([R, R_E], -1), B_u[layer], B_n[layer, n], m[layer], rho[layer], slice(None))
            for n in range(2)
        ]
        torch.testing.assert_close(found[layer], torch.stack(tasks).mean())


def test_without_valid_tokens_the_log_term_remains():
    tensors = inputs()
    variance = functional.softplus(tensors[-1]) + S_MIN**2
    torch.testing.assert_close(term(*tensors, torch.zeros(T, dtype=torch.bool)), variance.log().sum() / 2)


def test_accumulates_in_fp32_under_autocast():
    z = torch.randn(T, R + R_E).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        S = second_moment(z)
    assert S.dtype == torch.float32
    torch.testing.assert_close(S, z.float().T @ z.float())


def test_variance_starts_at_one_and_never_falls_below_its_floor():
    zeros = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    B_u, B_n = torch.zeros(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for s_min in (0.01, 0.1, 0.9):
        for rho, variance in ((initial_rho(s_min), 1.0), (-1e4, s_min**2)):
            rho = torch.full((1, 1), rho, dtype=torch.float64)
            found = mutual_information(zeros, B_u, B_n, torch.ones_like(rho), rho, torch.ones(1), s_min=s_min)
            torch.testing.assert_close((2 * found).exp(), torch.tensor([variance], dtype=torch.float64))
    assert at_least_fp32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
