"""MTL-LoRA against its formula in float64, for one task and for a task of each row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lvlm_clorae import MTLLoRAConfig
from lvlm_clorae.adapters.methods.mtllora import MTLLoRAFactors
from tests.helpers.adapters import TASKS, adapted, batch, gradients, layers_of, set_task, t5

D_IN, D_OUT, R, N, TAU = 7, 5, 3, 2, 0.5


def factors(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    given = {"tasks": TASKS, "r": R, "lora_alpha": 5, "num_up_projections": N, "temperature": TAU}
    layer = MTLLoRAFactors(D_IN, D_OUT, MTLLoRAConfig(**{**given, **fields})).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype)


def tokens(rows=2, dtype=torch.float64):
    return torch.randn(rows, 4, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def zeros(inputs):
    return inputs.new_zeros(*inputs.shape[:-1], D_OUT)


def released(p, x, lambda_index):
    """The layer after the authors' src/adapter/mlora.py (github.com/pUmpKin-Co/MTL-LoRA): a task index for each row."""
    shares = functional.softmax(p["task_mixture"] / TAU, dim=-1)
    task_B = (shares @ p["B"].view(N, -1)).view(-1, D_OUT, R)
    after_A = torch.bmm(x, p["A"].expand(len(x), -1, -1).transpose(-2, -1))
    after_A = torch.bmm(after_A, p["task_transform"].index_select(0, lambda_index).transpose(-2, -1))
    return torch.bmm(after_A, task_B.index_select(0, lambda_index).transpose(-2, -1)) * (5 / R)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("task", [1, torch.tensor([2, 0]), torch.tensor([1])])
def test_output_and_every_gradient_equal_the_released_layer(task, dropout):
    layer, inputs, plain = factors(lora_dropout=dropout), tokens().requires_grad_(), tokens().requires_grad_()
    p = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    index = (task if isinstance(task, torch.Tensor) else torch.tensor([task])).repeat(2)[:2]
    base = torch.randn(2, 4, D_OUT, dtype=torch.float64)
    torch.manual_seed(5)
    output, aux, weights = layer(base.clone(), inputs, task)
    torch.manual_seed(5)
    expected = base + released(p, functional.dropout(plain, dropout), index)
    assert (aux, weights) == (None, None)
    torch.testing.assert_close(output, expected)
    (output**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(inputs.grad, plain.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad)


def test_fp32_is_close_to_float64():
    results = []
    for dtype in (torch.float64, torch.float32):
        layer, inputs = factors(dtype), tokens(dtype=dtype).requires_grad_()
        output = layer(zeros(inputs), inputs, 1)[0]
        (output**2).sum().backward()
        results.append([output.detach(), inputs.grad, *(p.grad for p in layer.parameters())])
    for number, (exact, single) in enumerate(zip(*results, strict=True)):
        assert (single - exact).norm() / exact.norm() < (1e-4 if number else 1e-5)


def test_inputs_of_other_ranks_equal_those_of_rank_three():
    layer, inputs = factors(), tokens(4)
    for task in (0, torch.tensor([0, 1, 2, 0])):
        expected = layer(zeros(inputs), inputs, task)[0]
        wide = inputs.unflatten(1, (2, 2))
        torch.testing.assert_close(layer(zeros(wide), wide, task)[0].flatten(1, 2), expected)
        first = inputs[:, 0]
        torch.testing.assert_close(layer(zeros(first), first, task)[0], expected[:, 0])


def test_initial_values_are_those_of_the_released_layer():
    layer = MTLLoRAFactors(D_IN, D_OUT, MTLLoRAConfig(tasks=TASKS, r=R))
    assert torch.equal(layer.task_transform, torch.eye(R).expand(3, R, R))
    assert torch.count_nonzero(layer.B) == 0
    assert 0 < layer.task_mixture.abs().max() <= 3**-0.5  # Kaiming-uniform(a=sqrt 5) over three up-projections


def test_a_mixed_batch_equals_its_tasks_one_by_one():
    model = adapted("mtllora", t5()).eval()
    alone = []
    for row, task in enumerate(("mee", "mner")):
        set_task(model, task)
        alone.append(model(**batch()).logits[row])
    set_task(model, torch.tensor([2, 0]))
    torch.testing.assert_close(model(**batch()).logits, torch.stack(alone))


def test_other_tasks_get_a_gradient_of_exactly_zero():
    model = adapted("mtllora", t5(), task="mre")
    model(**batch()).loss.backward()
    for name, gradient in gradients(model).items():
        if "task_" in name:
            assert torch.count_nonzero(gradient[1]), name
            assert not torch.count_nonzero(gradient[[0, 2]]), name


def test_a_forward_without_a_task_and_merging_raise():
    model = adapted("mtllora", t5(), task=None)
    with pytest.raises(ValueError, match=r"set_task.*mner.*mre.*mee"):
        model(**batch())
    with pytest.raises(NotImplementedError, match="depends on the task"):
        model.merge_and_unload()
    assert layers_of(model)


def test_config():
    assert MTLLoRAConfig(tasks=TASKS, r=4).lora_alpha == 8
    for fields in (
        {"tasks": []},
        *({"num_up_projections": value} for value in (0, 1.5, True)),
        *({"temperature": value} for value in (0, -1, float("inf"), float("nan"), True)),
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            MTLLoRAConfig(**{"tasks": TASKS, **fields})
