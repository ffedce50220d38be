"""LoRAMoE against its formula in float64, expert by expert, and its balancing loss over tasks, rows and ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from lvlm_clorae import LoRAMoEConfig
from lvlm_clorae.adapters.loramoe import LoRAMoEExperts
from tests.adapters.clorae_reference import TASKS
from tests.adapters.methods import adapted, batch, gradients, layers_of, t5

D_IN, D_OUT, E = 7, 5, 4
VALID = torch.tensor([[1, 1, 1], [1, 0, 0]]) != 0


def experts(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    config = LoRAMoEConfig(
        **{"tasks": TASKS, "r": 4, "lora_alpha": 6, "num_experts": E, "balance_delta": 0.3, **fields}
    )
    made = LoRAMoEExperts(D_IN, D_OUT, config).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.to(dtype)


def tokens(rows=2, dtype=torch.float64):
    return torch.randn(rows, 3, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def zeros(inputs):
    return inputs.new_zeros(*inputs.shape[:-1], D_OUT)


def formula(p, inputs, dropped, task, valid, delta=0.3):
    """One expert after the other; Z as the paper's text has it."""
    g = (inputs @ p["router"].T).softmax(-1)
    output, Z = 0, []
    for i in range(E):
        output = output + g[..., i : i + 1] * (6 / 4) * (dropped @ p["A"][i].T @ p["B"][i].T)
        Z.append((g[..., i] * valid).sum() * ((1 + delta) if i % 3 == task else (1 - delta)))
    return output, torch.stack(Z), g


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("task", [0, 2])
def test_forward_and_every_gradient_equal_the_formula(task, dropout):
    made, inputs, plain = experts(lora_dropout=dropout), tokens().requires_grad_(), tokens().requires_grad_()
    p = {name: value.detach().clone().requires_grad_() for name, value in made.named_parameters()}
    torch.manual_seed(5)
    output, Z, weights = made(zeros(inputs), inputs, task, VALID)
    torch.manual_seed(5)
    expected, expected_Z, g = formula(p, plain, functional.dropout(plain, dropout), task, VALID)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(Z, expected_Z)
    torch.testing.assert_close(weights, g.detach())
    ((output**2).sum() + (Z**3).sum()).backward()
    ((expected**2).sum() + (expected_Z**3).sum()).backward()
    torch.testing.assert_close(inputs.grad, plain.grad)
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad)


@pytest.mark.parametrize("task", [1, torch.tensor([2, 0])])
def test_gradcheck(task):
    made = experts()
    names, values = zip(*made.named_parameters(), strict=True)

    def run(inputs, *parameters):
        parameters = dict(zip(names, parameters, strict=True))
        return functional_call(made, parameters, (zeros(inputs), inputs, task, VALID))[:2]

    assert torch.autograd.gradcheck(run, (tokens().requires_grad_(), *values))


def test_fp32_is_close_to_float64():
    results = []
    for dtype in (torch.float64, torch.float32):
        made, inputs = experts(dtype), tokens(dtype=dtype).requires_grad_()
        output, Z, _ = made(zeros(inputs), inputs, 1)
        ((output**2).sum() + (Z**2).sum()).backward()
        results.append([output.detach(), Z.detach(), inputs.grad, *(p.grad for p in made.parameters())])
    for number, (exact, single) in enumerate(zip(*results, strict=True)):
        assert (single - exact).norm() / exact.norm() < (1e-4 if number > 1 else 1e-5)


def test_rows_of_their_own_task_add_up():
    made, inputs = experts(), tokens()
    output, Z, _ = made(zeros(inputs), inputs, torch.tensor([2, 0]), VALID)
    singles = [
        made(zeros(inputs[i : i + 1]), inputs[i : i + 1], task, VALID[i : i + 1]) for i, task in ((0, 2), (1, 0))
    ]
    torch.testing.assert_close(Z, singles[0][1] + singles[1][1])
    torch.testing.assert_close(output, torch.cat([single[0] for single in singles]))
    with pytest.raises(ValueError, match=r"3 rows.*batch has 2.*mner, mre, mee"):
        made(zeros(inputs), inputs, torch.tensor([0, 1, 2]))


def test_the_task_matters_to_the_balancing_loss_alone():
    made, inputs = experts(), tokens()
    with pytest.raises(ValueError, match=r"set_task.*mner, mre, mee"):
        made(zeros(inputs), inputs, None)
    assert torch.equal(made(zeros(inputs), inputs, 0)[0], made(zeros(inputs), inputs, 1)[0])
    assert made.eval()(zeros(inputs), inputs, None)[1] is None
    free = experts(use_balance=False)
    assert free(zeros(inputs), inputs, None)[1] is None


def test_the_balancing_loss_of_two_ranks_is_that_of_their_tokens_together():
    """Averaged over the ranks, as data parallelism does, the gradients are those of the whole batch."""
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
        model.balance_loss(lambda Z: recorded.append(Z) or Z)
    total = recorded[0] + recorded[1]
    averaged = {}
    for half in halves:
        model = adapted("loramoe", t5()).train()
        model(**half)
        rank_loss = model.balance_loss(lambda Z: total, 2)
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
    with pytest.raises(RuntimeError, match="call the model first"):
        model.balance_loss()
    model(**batch())
    assert model.balance_loss().requires_grad
    for weights in model.gate_statistics().values():
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
        assert weights.shape == (6,)
    model.eval()(**batch())
    assert model.balance_loss() == 0


def test_merging_and_unmerging_are_refused():
    model = adapted("loramoe", t5())
    (layer, *_) = layers_of(model).values()
    for refused in (model.merge_adapter, model.merge_and_unload, model.unmerge_adapter, layer.merge):
        with pytest.raises(NotImplementedError, match="gate depends on the token"):
            refused()


def test_config():
    config = LoRAMoEConfig(tasks=TASKS, r=128)
    assert (config.num_experts, config.expert_r) == (6, 43)
    for fields, message in (
        ({"tasks": []}, "missing"),
        ({"num_experts": 2}, "num_experts=2"),
        ({"expert_r": 0}, "expert_r=0"),
        ({"balance_delta": 1.0}, "balance_delta"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAMoEConfig(**{"tasks": TASKS, **fields})
