"""The fused layer against the paper's equations in float64: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lvlm_clorae.adapters.methods.clorae import CLoRAEConfig, CLoRAEExperts
from lvlm_clorae.adapters.methods.clorae.fused import keep_mask
from tests.helpers.adapters import TASKS
from tests.helpers.clorae_reference import (
    ABLATIONS,
    D_IN,
    D_OUT,
    apply,
    parameters_of,
    plain_clorae,
    random_experts,
    tokens,
)

both_dropouts = pytest.mark.parametrize("dropout", [0.0, 0.4])
ablations = pytest.mark.parametrize("fields", ABLATIONS.values(), ids=ABLATIONS.keys())


def value_of(delta, mim):
    """Return a scalar in which every output has another weight."""
    weights = torch.linspace(-1, 2, delta.numel(), dtype=delta.dtype).reshape(delta.shape)
    return (weights * delta).sum() + (0.7 * mim if mim is not None else 0.0)


@both_dropouts
@ablations
@pytest.mark.parametrize("task", [0, 2])
def test_forward_and_every_gradient_equal_the_equations(fields, dropout, task):
    experts = random_experts(lora_dropout=dropout, **fields)
    p, x, x_ref = parameters_of(experts), tokens(3, 4).requires_grad_(), tokens(3, 4).requires_grad_()
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]) != 0

    torch.manual_seed(5)
    delta, mim, task_weight = apply(experts, x, task, valid)
    value_of(delta, mim).backward()
    torch.manual_seed(5)
    dropped = x_ref
    if dropout:
        dropped = x_ref * keep_mask(x_ref, int(torch.randint(2**62, ())), dropout) / (1 - dropout)
    expected = plain_clorae(p, x_ref, dropped, task, experts.config)
    expected_mim = None if expected.density is None else expected.density[valid].mean()
    value_of(expected.delta, expected_mim).backward()

    torch.testing.assert_close(delta, expected.delta)
    assert (mim is None) == (expected_mim is None) == (not experts.config.use_mim)
    if mim is not None:
        torch.testing.assert_close(mim, expected_mim)
    if expected.gate is not None:
        torch.testing.assert_close(task_weight, expected.gate[..., 1].detach())
    torch.testing.assert_close(x.grad, x_ref.grad)
    for name, parameter in experts.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "fields",
    [{"mim_detach_teacher": False}, {"mim_detach_teacher": False, "use_gate": False}],
)
@pytest.mark.parametrize("task", [1, torch.tensor([2, 0])])
def test_gradcheck(fields, task):
    experts = random_experts(r=2, **fields)
    names, values = zip(*experts.named_parameters(), strict=True)
    valid = torch.tensor([[True, True], [True, False]])

    def run(x, *parameters):
        arguments = (x.new_zeros(*x.shape[:-1], D_OUT), x, task, valid)
        delta, aux, _ = functional_call(experts, dict(zip(names, parameters, strict=True)), arguments)
        return delta, *aux

    assert torch.autograd.gradcheck(run, (tokens(2, 2).requires_grad_(), *values))


@ablations
def test_fp32_is_close_to_float64(fields):
    exact, single = random_experts(**fields), random_experts(dtype=torch.float32, **fields)
    x, x32 = tokens(4, 6).requires_grad_(), tokens(4, 6, dtype=torch.float32).requires_grad_()
    delta, mim, _ = apply(exact, x, 1)
    delta32, mim32, _ = apply(single, x32, 1)
    value_of(delta, mim).backward()
    value_of(delta32, mim32).backward()

    def error(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    assert error(delta32, delta) < 1e-5
    assert mim is None or error(mim32, mim) < 1e-5
    for name, parameter in single.named_parameters():
        reference = dict(exact.named_parameters())[name].grad
        assert reference.norm() == 0 or error(parameter.grad, reference) < 1e-4, name


def test_mim_is_fp32_under_autocast_and_the_output_keeps_its_dtype():
    experts, x = random_experts(dtype=torch.float32), tokens(2, 3, dtype=torch.float32)
    exact = apply(experts, x, 0)
    for task in (0, torch.tensor([0, 0])):
        with torch.autocast("cpu", torch.bfloat16):
            delta, mim, weight = apply(experts, x, task)
        assert (delta.dtype, mim.dtype, weight.dtype) == (torch.float32, torch.float32, torch.float32)
        products = delta / experts.config.scaling
        torch.testing.assert_close(products, products.bfloat16().float(), rtol=1e-6, atol=0)  # they are in bf16
        torch.testing.assert_close(delta, exact[0], rtol=0.05, atol=0.05)
        (delta.sum() + mim).backward()


@both_dropouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [33, 66, 98, 100])
def test_uninitialized_memory_is_not_read(length, dtype, dropout, monkeypatch):
    """Products in bf16 read beyond the rows of a matrix on CPUs with AMX."""
    empty = torch.Tensor.new_empty

    def filled(self, *size, **options):
        return empty(self, *size, **options).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    experts = random_experts(lora_dropout=dropout, dtype=dtype, r=24)
    x = tokens(1, length, dtype=dtype).requires_grad_()
    delta, mim, _ = apply(experts, x, 0)
    value_of(delta, mim).backward()
    assert all(tensor.isfinite().all() for tensor in (delta, mim, x.grad))
    assert all(parameter.grad.isfinite().all() for parameter in experts.parameters())


def test_bf16_parameters():
    experts = random_experts(dtype=torch.bfloat16)
    delta, mim, _ = apply(experts, tokens(2, 3, dtype=torch.bfloat16), 0)
    assert (delta.dtype, mim.dtype) == (torch.bfloat16, torch.float32)


def test_absent_experts_have_a_gradient_of_exactly_zero():
    experts = random_experts(lora_dropout=0.1)
    delta, mim, _ = apply(experts, tokens(2, 3), 1)
    value_of(delta, mim).backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
    for stacked in (experts.expert_A, experts.expert_B):
        assert torch.count_nonzero(stacked.grad[[0, 2]]) == 0
        assert torch.count_nonzero(stacked.grad[1]) > 0


def test_initial_delta_and_mim_are_zero_and_the_gate_is_even():
    torch.manual_seed(0)
    experts = CLoRAEExperts(512, 64, CLoRAEConfig(tasks=TASKS, r=8))
    delta, mim, task_weight = apply(experts, torch.randn(2, 3, 512), 2)
    assert torch.count_nonzero(delta) == 0
    assert torch.all(task_weight == 0.5)
    assert mim.abs() < 1e-5
    assert experts.expert_A.shape == (3, 3, 512)
    for matrix in (experts.universal_A, *experts.expert_A):  # Kaiming-uniform(a=sqrt 5): within 1 / sqrt(d_in)
        assert 0.9 / 512**0.5 < matrix.abs().max() <= 1 / 512**0.5


@ablations
def test_mixed_tasks_equal_single_rows(fields):
    experts, x, rows = random_experts(**fields), tokens(4, 3), [0, 2, 1, 2]
    valid = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]) != 0
    delta, mim, weight = apply(experts, x, torch.tensor(rows), valid)
    singles = [apply(experts, x[i : i + 1], task, valid[i : i + 1]) for i, task in enumerate(rows)]
    torch.testing.assert_close(delta, torch.cat([single[0] for single in singles]))
    if mim is not None:
        share = valid.sum(-1) / valid.sum()
        torch.testing.assert_close(mim, sum(share[i] * single[1] for i, single in enumerate(singles)))
    if weight is not None:
        torch.testing.assert_close(weight, torch.cat([single[2] for single in singles]))


@ablations
@pytest.mark.parametrize("task", [0, torch.tensor([2, 0, 2])], ids=["one", "rows"])
def test_evaluation_equals_the_equations_and_follows_every_change(fields, task):
    """The joined matrices that evaluation keeps are those of the parameters, however they change."""
    experts, x = random_experts(**fields).eval(), tokens(3, 4)

    def difference():
        with torch.no_grad():
            return (apply(experts, x, task)[0] - expected()).abs().max().item()

    def expected():
        with torch.enable_grad():
            return apply(experts, x, task)[0].detach()

    assert difference() < 1e-12
    for parameter in experts.parameters():
        with torch.no_grad():
            parameter.mul_(-2)
        assert difference() < 1e-12, "in place"
    experts.train()
    for parameter in experts.parameters():
        parameter.data.mul_(3)  # as DeepSpeed's optimizers: no version counts it
    experts.eval()
    assert difference() < 1e-12, "by training"
    if experts.config.use_experts:
        task = 1
        assert difference() < 1e-12, "by another task"
        experts.add_expert(0, trainable=True)
        experts.config.tasks.append("new")
        task = 3
        assert difference() < 1e-12, "by another expert"
    experts.load_state_dict({name: value + 1 for name, value in experts.state_dict().items()})
    assert difference() < 1e-12, "by loading"


def test_evaluation_keeps_the_joined_matrices_between_tokens():
    experts, x = random_experts().eval(), tokens(3, 1)
    with torch.no_grad():
        first, again = (experts.joined(0, x.dtype) for _ in range(2))
        assert first is again
        assert experts.joined(1, x.dtype) is not first
    experts.train()
    assert experts._kept is None, "training needs the memory"
    with torch.inference_mode():
        experts = random_experts().eval()
        assert torch.equal(apply(experts, x, 0)[0], apply(experts, x, 0)[0]), "parameters without a version"


def test_task_indices_expand_with_beams_and_must_divide_the_batch():
    experts, x = random_experts(), tokens(4, 3)
    delta, _, _ = apply(experts, x, torch.tensor([2, 0]))
    torch.testing.assert_close(delta, apply(experts, x, torch.tensor([2, 2, 0, 0]))[0])
    with pytest.raises(ValueError, match=r"3 .*4.*mner.*mre.*mee"):
        apply(experts, x, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2)])
def test_any_number_of_dimensions(shape):
    experts, x = random_experts(), tokens(*shape)
    delta, mim, weight = apply(experts, x, 1)
    by_row, mim_by_row, weight_by_row = apply(experts, x, torch.ones(shape[0], dtype=torch.long))
    assert delta.shape == (*shape, D_OUT)
    assert weight.shape == shape
    for a, b in ((delta, by_row), (mim, mim_by_row), (weight, weight_by_row)):
        torch.testing.assert_close(a, b)


def test_forward_without_task_raises():
    with pytest.raises(ValueError, match=r"set_task.*mner.*mre.*mee"):
        apply(random_experts(), tokens(2, 3), None)
    apply(random_experts(use_experts=False), tokens(2, 3), None)  # needs no task


def test_mim_is_computed_only_in_training_with_gradients():
    experts, x = random_experts(), tokens(2, 3)
    with torch.no_grad():
        assert apply(experts, x, 0)[1] is None
    assert apply(experts.eval(), x, 0)[1] is None


@pytest.mark.parametrize("task", [0, torch.tensor([0])])
def test_no_tensor_of_tokens_by_output_channels_is_saved(task):
    d_out, t = 1000, 64
    config = CLoRAEConfig(tasks=TASKS, r=4, lora_dropout=0.1)
    experts, x, saved = CLoRAEExperts(D_IN, d_out, config), torch.randn(1, t, D_IN), []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s.shape) or s, lambda s: s):
        apply(experts, x, task)
    assert saved
    assert not [shape for shape in saved if t in shape and d_out in shape]


def test_universal_expert_alone_equals_pefts_lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D_IN, D_OUT))
    lora = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0"])).base_model.model[0]
    nn.init.normal_(lora.lora_B["default"].weight)
    experts = random_experts(use_experts=False, dtype=torch.float32)
    experts.universal_A.data, experts.universal_B.data = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    x = tokens(2, 3, dtype=torch.float32)
    torch.testing.assert_close(lora.base_layer(x) + apply(experts, x, None)[0], lora(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": []}, "tasks"),
        ({"tasks": ["a", "a"]}, "'a', 'a'"),
        ({"tasks": ["a", ""]}, "'a', ''"),
        ({"r": 0}, "r=0"),
        ({"expert_r": 0}, "expert_r=0"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"mim_s_min": 0.0}, "mim_s_min"),
        ({"use_universal": False, "use_experts": False}, "use_universal and use_experts"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        CLoRAEConfig(**{"tasks": TASKS, **fields})


def test_config_defaults():
    config = CLoRAEConfig(tasks=TASKS, r=8)
    assert (config.peft_type, config.expert_r, config.lora_alpha) == ("CLORAE", 3, 32)
    for ablation in ("use_gate", "use_universal", "use_experts"):
        assert CLoRAEConfig(tasks=TASKS, r=8, **{ablation: False}).lora_alpha == 16
    assert CLoRAEConfig(tasks=TASKS, r=8, lora_alpha=5).lora_alpha == 5
    assert CLoRAEConfig(tasks=list("abcdef"), r=2).expert_r == 1
    alone = CLoRAEConfig(tasks=TASKS, use_universal=False)
    assert (alone.use_gate, alone.use_mim) == (False, False)
    assert CLoRAEConfig(tasks=TASKS, target_modules={"v", "q"}).target_modules == ["q", "v"]
