"""In-place additions equal plain ones, also if only part of the graph is differentiated."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lvlm_clorae.adapters.inplace import GradientAdder, add_product
from tests.helpers.adapters import adapted, gradients, layers_of


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("view", [False, True])
def test_add_product_equals_the_sum(view):
    def run(x, h, B):
        output = 2 * x  # a new tensor, as a base layer returns
        return add_product(output.transpose(0, 1) if view else output, h, B)

    x, h, B = tensors((3, 2, 5), (2, 3, 4) if view else (3, 2, 4), (5, 4))
    expected = (2 * x).transpose(0, 1) if view else 2 * x
    torch.testing.assert_close(run(x, h, B), expected + h @ B.T)
    assert torch.autograd.gradcheck(run, (x, h, B))


def test_add_product_works_in_place():
    x, h, B = tensors((3, 5), (3, 4), (5, 4))
    output = 2 * x
    address = output.data_ptr()
    assert add_product(output, h, B).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adder_adds_its_product_once(dtype):
    (x,) = tensors((3, 4))
    adder = GradientAdder()
    output = adder.wrap(x.to(dtype)) * 3
    output.sum().backward(retain_graph=True)
    torch.testing.assert_close(x.grad, torch.full_like(x, 3))  # no product was set
    x.grad, adder.product = None, (torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64))
    output.sum().backward(retain_graph=True)
    torch.testing.assert_close(x.grad, torch.full_like(x, 5))
    x.grad = None
    output.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3))


def layer_and_input(**fields):
    torch.manual_seed(0)
    model = adapted("clorae", nn.Sequential(nn.Linear(6, 5)).double(), target_modules=["0"], **fields).double().train()
    (layer,) = layers_of(model).values()
    return model, layer, tensors((2, 3, 6))[0]


def by_rows(layer, x, upstream):
    """The input's gradient by the equations, which use no adder."""
    own = x.detach().clone().requires_grad_()
    task = layer.context.tasks["default"]
    layer.context.tasks["default"] = torch.full((len(x),), task)
    layer(own).backward(upstream)
    layer.context.tasks["default"] = task
    return own.grad


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_input_gradient_alone_and_repeatedly(dropout):
    model, layer, x = layer_and_input(lora_dropout=dropout)
    output = layer(x)
    upstream = torch.randn_like(output)
    (first,) = torch.autograd.grad(output, x, upstream, retain_graph=True)
    if not dropout:
        torch.testing.assert_close(first, by_rows(layer, x, upstream))
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(output, parameters, upstream, retain_graph=True, allow_unused=True)  # leaves a product behind
    (again,) = torch.autograd.grad(output, x, upstream)
    assert torch.equal(first, again)


def test_input_with_another_use():
    _, layer, x = layer_and_input()
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.autograd.backward([layer(x), (x**2).sum()], [upstream, None])
    torch.testing.assert_close(x.grad, by_rows(layer, x, upstream) + 2 * x.detach())


def test_base_layer_output_without_graph():
    _, layer, x = layer_and_input()
    layer.base_layer.register_forward_hook(lambda module, args, output: output.detach())
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, by_rows(layer, x, upstream))
    assert torch.count_nonzero(x.grad) == x.numel()


@pytest.mark.parametrize("reentrant", [False, True])
def test_input_gradient_under_checkpointing(reentrant):
    _, layer, x = layer_and_input()
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    checkpoint(layer, x, use_reentrant=reentrant).backward(upstream)
    torch.testing.assert_close(x.grad, by_rows(layer, x, upstream))


def test_two_active_adapters_have_an_adder_each():
    model, layer, x = layer_and_input()
    model.add_adapter("second", model.peft_config["default"])
    nn.init.normal_(layer.adapters["second"].universal_B)
    model.double()
    model.base_model.set_adapter(["default", "second"])
    model.set_task("mre")
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    layer(x).backward(upstream)
    own = x.detach().clone().requires_grad_()
    model.set_task(torch.tensor([1, 1]))
    layer(own).backward(upstream)
    torch.testing.assert_close(x.grad, own.grad)
    assert torch.count_nonzero(gradients(model)["base_model.model.0.clorae_experts.second.universal_B"])


def test_input_without_gradient_has_no_adder_and_the_same_parameter_gradients():
    model, layer, x = layer_and_input()
    experts = layer.adapters["default"]
    assert experts.gradient_adder(x, 0) is not None
    assert experts.gradient_adder(x.detach(), 0) is None
    found = []
    for inputs in (x, x.detach()):
        model.zero_grad()
        layer(inputs).square().sum().backward()
        found.append(gradients(model))
    assert found[0]
    torch.testing.assert_close(found[1], found[0])
