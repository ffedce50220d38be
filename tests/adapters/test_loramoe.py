"""LoRAMoE against its formula in float64, expert by expert, and its balancing loss over tasks, samples and ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lvlm_clorae import LoRAMoEConfig
from lvlm_clorae.adapters.methods.loramoe import LoRAMoEExperts
from lvlm_clorae.losses.balance import balance, importance, moments
from tests.helpers.adapters import TASKS, adapted, batch, gradients, layers_of, t5

D_IN, D_OUT, E = 7, 5, 4
VALID = torch.tensor([[1, 1, 1], [1, 0, 0]]) != 0


def experts(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    config = LoRAMoEConfig(
        **{"tasks": TASKS, "r": 4, "lora_alpha": 6, "num_experts": E, "balance_delta": 0.3, **fields}
    )
    layer = LoRAMoEExperts(D_IN, D_OUT, config).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype)


def tokens(rows=2, dtype=torch.float64):
    return torch.randn(rows, 3, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def zeros(inputs):
    return inputs.new_zeros(*inputs.shape[:-1], D_OUT)


def loss_of(aux, delta=0.3):
    """The balancing loss of one layer's auxiliary tensors."""
    return balance(moments(importance(*aux, delta)))


def formula(p, inputs, dropped, tasks, valid, delta=0.3):
    """One expert after the other, and the released code's loss (tests/losses/test_balance.py) over samples."""
    g = (inputs @ p["router"].T).softmax(-1)
    output = 0
    Z = torch.zeros(len(inputs), E, dtype=inputs.dtype)
    for i in range(E):
        output = output + g[..., i : i + 1] * (6 / 4) * (dropped @ p["A"][i].T @ p["B"][i].T)
        for b, task in enumerate(tasks):
            Z[b, i] = (g[b, :, i] * valid[b]).sum() * ((1 + delta) if i % 3 == task else (1 - delta))
    return output, Z.var() / (Z.mean() ** 2 + 1e-10), g


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("task", [0, torch.tensor([2, 0])])
def test_output_loss_and_every_gradient_equal_the_formula(task, dropout):
    layer, inputs, plain = experts(lora_dropout=dropout), tokens().requires_grad_(), tokens().requires_grad_()
    p = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    torch.manual_seed(5)
    output, aux, weights = layer(zeros(inputs), inputs, task, VALID)
    loss = loss_of(aux)
    torch.manual_seed(5)
    tasks = task.tolist() if isinstance(task, torch.Tensor) else [task] * 2
    expected, expected_loss, g = formula(p, plain, functional.dropout(plain, dropout), tasks, VALID)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(loss, expected_loss)
    assert loss > 1e-3
    torch.testing.assert_close(weights, g.detach())
    ((output**2).sum() + loss).backward()
    ((expected**2).sum() + expected_loss).backward()
    torch.testing.assert_close(inputs.grad, plain.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad)


def test_fp32_is_close_to_float64():
    results = []
    for dtype in (torch.float64, torch.float32):
        layer, inputs = experts(dtype), tokens(dtype=dtype).requires_grad_()
        output, aux, _ = layer(zeros(inputs), inputs, 1)
        loss = loss_of(aux)
        ((output**2).sum() + loss).backward()
        results.append([output.detach(), loss.detach(), inputs.grad, *(p.grad for p in layer.parameters())])
    for number, (exact, single) in enumerate(zip(*results, strict=True)):
        assert (single - exact).norm() / exact.norm() < (1e-4 if number > 1 else 1e-5)


def test_task_indices_must_divide_the_batch():
    layer, inputs = experts(), tokens()
    with pytest.raises(ValueError, match=r"3 .*2.*mner.*mre.*mee"):
        layer(zeros(inputs), inputs, torch.tensor([0, 1, 2]))


def test_the_task_affects_the_balancing_loss_alone():
    layer, inputs = experts(), tokens()
    with pytest.raises(ValueError, match=r"set_task.*mner.*mre.*mee"):
        layer(zeros(inputs), inputs, None)
    (first, one, _), (second, other, _) = (layer(zeros(inputs), inputs, task) for task in (0, 1))
    assert torch.equal(first, second)
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])
    assert layer.eval()(zeros(inputs), inputs, None)[1] is None
    free = experts(use_balance=False)
    assert free(zeros(inputs), inputs, None)[1] is None


def test_the_model_sums_over_its_layers():
    model = adapted("loramoe", t5()).train()
    model(**batch())
    losses = [loss_of(term.tensors, 0.1) for term in model.base_model._context.aux_terms]
    assert len(losses) == len(layers_of(model)) > 1
    torch.testing.assert_close(model.balance_loss(), torch.stack(losses).sum().float())


def test_balance_loss_of_two_ranks_equals_that_of_the_whole_batch():
    """Averaged over the ranks, as in data parallelism, the gradients are those of the whole batch."""
    inputs = batch()
    whole = adapted("loramoe", t5()).train()
    whole(**inputs)
    loss = whole.balance_loss()
    loss.backward()

    halves = [{name: tensor[row : row + 1] for name, tensor in inputs.items()} for row in (0, 1)]
    recorded = []
    for half in halves:
        model = adapted("loramoe", t5()).train()
        model(**half)
        model.balance_loss(lambda own: recorded.append(own) or own, 2)
    total = recorded[0] + recorded[1]
    averaged = {}
    for half in halves:
        model = adapted("loramoe", t5()).train()
        model(**half)
        rank_loss = model.balance_loss(lambda own: total, 2)
        torch.testing.assert_close(rank_loss, loss)
        rank_loss.backward()
        for name, gradient in gradients(model).items():
            averaged[name] = averaged.get(name, 0) + gradient / 2
    routers = [name for name in averaged if name.endswith("router")]
    assert len(routers) == len(layers_of(whole))
    for name in routers:
        torch.testing.assert_close(averaged[name], gradients(whole)[name], rtol=1e-4, atol=1e-7)


def test_gate_statistics_and_the_loss_of_the_last_training_forward():
    model = adapted("loramoe", t5()).train()
    with pytest.raises(RuntimeError, match="forward"):
        model.balance_loss()
    model(**batch())
    assert model.balance_loss().requires_grad
    for weights in model.gate_statistics().values():
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
        assert weights.shape == (6,)
    model.eval()(**batch())
    assert model.balance_loss() == 0


def test_merging_raises():
    model = adapted("loramoe", t5())
    (layer, *_) = layers_of(model).values()
    for method in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(NotImplementedError, match="gate depends on the token"):
            method()


def test_config():
    config = LoRAMoEConfig(tasks=TASKS, r=128)
    assert (config.num_experts, config.expert_r) == (6, 43)
    for fields, message in (
        ({"tasks": []}, "tasks"),
        ({"num_experts": 2}, "num_experts=2"),
        ({"expert_r": 0}, "expert_r=0"),
        ({"balance_delta": 1.0}, "balance_delta"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAMoEConfig(**{"tasks": TASKS, **fields})
