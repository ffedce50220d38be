"""MoSLoRA against its formula in float64 and PEFT's LoRA, and merging."""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from lvlm_clorae import MoSLoRAConfig
from lvlm_clorae.adapters.methods.moslora import MoSLoRAFactors
from tests.helpers.adapters import BASE_LAYERS, Net, adapted, batch, layers_of, net_input, t5

D_IN, D_OUT = 7, 5


def factors(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    made = MoSLoRAFactors(D_IN, D_OUT, MoSLoRAConfig(r=3, lora_alpha=5, **fields)).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.to(dtype)


def tokens(dtype=torch.float64):
    return torch.randn(2, 4, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def leaves(module):
    return {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_and_every_gradient_equal_the_formula(dropout):
    made, inputs, plain = factors(lora_dropout=dropout), tokens().requires_grad_(), tokens().requires_grad_()
    p = leaves(made)
    base = torch.randn(2, 4, D_OUT, dtype=torch.float64)
    torch.manual_seed(5)
    output, aux, weights = made(base.clone(), inputs, None)  # works in place
    torch.manual_seed(5)
    dropped = functional.dropout(plain, dropout)
    expected = base.clone()
    for row in range(2):  # token by token
        for position in range(4):
            expected[row, position] += 5 / 3 * (p["B"] @ (p["mixer"] @ (p["A"] @ dropped[row, position])))
    assert (aux, weights) == (None, None)
    torch.testing.assert_close(output, expected)
    (output**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(inputs.grad, plain.grad)
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad)


def test_gradcheck():
    made = factors()
    names, values = zip(*made.named_parameters(), strict=True)

    def run(inputs, *parameters):
        base = inputs.new_zeros(2, 4, D_OUT)
        return functional_call(made, dict(zip(names, parameters, strict=True)), (base, inputs, None))[0]

    assert torch.autograd.gradcheck(run, (tokens().requires_grad_(), *values))


def test_fp32_is_close_to_float64():
    results = []
    for dtype in (torch.float64, torch.float32):
        made, inputs = factors(dtype), tokens(dtype).requires_grad_()
        output = made(torch.zeros(2, 4, D_OUT, dtype=dtype), inputs, None)[0]
        (output**2).sum().backward()
        results.append([output.detach(), inputs.grad, *(p.grad for p in made.parameters())])
    for number, (exact, single) in enumerate(zip(*results, strict=True)):
        assert (single - exact).norm() / exact.norm() < (1e-4 if number else 1e-5)


def test_identity_mixer_equals_pefts_lora():
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT)
    lora = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    layer = lora.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    made = factors(torch.float32)
    made.A.data, made.B.data = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    made.mixer.data = torch.eye(3)
    inputs = tokens(torch.float32)
    torch.testing.assert_close(made(base(inputs), inputs, None)[0], layer(inputs))


def test_mixer_initialisation():
    torch.manual_seed(0)
    mixer = MoSLoRAFactors(D_IN, D_OUT, MoSLoRAConfig(r=4, init_mixer="orthogonal")).mixer
    torch.testing.assert_close(mixer @ mixer.T, torch.eye(4))
    mixer = MoSLoRAFactors(D_IN, D_OUT, MoSLoRAConfig(r=4)).mixer
    assert 0 < mixer.abs().max() <= 0.5  # Kaiming-uniform(a=sqrt 5): within 1 / sqrt(r)
    with pytest.raises(ValueError, match="init_mixer"):
        MoSLoRAConfig(init_mixer="zero")


@torch.no_grad()
def test_merge_preserves_the_output_and_unmerge_restores_the_base():
    expected_base = t5().eval()(**batch()).logits
    model = adapted("moslora", t5()).eval()
    expected = model(**batch()).logits
    model.merge_adapter()
    assert all(layer.merged for layer in layers_of(model).values())
    torch.testing.assert_close(model(**batch()).logits, expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, expected_base, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    bare = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(bare(**batch()).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in bare.modules())


@torch.no_grad()
@pytest.mark.parametrize("layer_type", ["linear with bias", "conv1d"])
def test_merging_into_linear_and_conv1d(layer_type):
    model = adapted("moslora", Net(BASE_LAYERS[layer_type]()), target_modules=["layer"]).eval()
    expected, weight = model(net_input()), layers_of(model)["layer"].weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(net_input()), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(layers_of(model)["layer"].weight, weight)
    torch.testing.assert_close(model.merge_and_unload()(net_input()), expected)


def packed_4bit():
    """A 4-bit layer with a floating-point storage dtype, as for FSDP."""
    layer = bnb.nn.Linear4bit(Net.D_IN, Net.D_OUT, bias=False, quant_storage=torch.bfloat16)
    return layer.to("cpu")  # quantises


@pytest.mark.parametrize("layer", [BASE_LAYERS["8bit"], BASE_LAYERS["4bit"], packed_4bit])
def test_merging_into_a_quantised_layer_raises(layer):
    model = adapted("moslora", Net(layer()), target_modules=["layer"]).eval()
    with pytest.raises(NotImplementedError, match="quantized"):
        model.merge_adapter()
    assert not layers_of(model)["layer"].merged


@torch.no_grad()
def test_merging_into_a_bf16_weight_rounds_once():
    model = adapted("moslora", Net(BASE_LAYERS["linear"]().bfloat16()), target_modules=["layer"])
    layer = layers_of(model)["layer"]
    exact = layer.weight.float() + layer.adapters["default"].delta_weight()
    model.merge_adapter()
    assert torch.equal(layer.weight, exact.bfloat16())


@torch.no_grad()
def test_merging_named_adapters():
    model = adapted("moslora", Net(BASE_LAYERS["linear"]()), target_modules=["layer"]).eval()
    first = model(net_input())
    model.add_adapter("second", MoSLoRAConfig(r=2, target_modules=["layer"]))
    nn.init.normal_(layers_of(model)["layer"].adapters["second"].B)
    model.set_adapter("second")
    second = model(net_input())
    assert not torch.allclose(first, second)
    model.merge_adapter(adapter_names=["default"])
    torch.testing.assert_close(model(net_input()), first)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    torch.testing.assert_close(model(net_input()), second)
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["default"])(net_input()), first)


@torch.no_grad()
def test_safe_merge_refuses_infinite_weights():
    model = adapted("moslora", t5()).eval()
    weights = {name: p.clone() for name, p in model.named_parameters() if "moslora" not in name}
    next(iter(layers_of(model).values())).adapters["default"].mixer.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
