"""HydraLoRA against its formula in float64, one up-projection after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lvlm_clorae import HydraLoRAConfig
from lvlm_clorae.adapters.methods.hydralora import HydraLoRAFactors
from lvlm_clorae.adapters.register import adapter_method
from lvlm_clorae.training.config import TrainConfig
from tests.helpers.adapters import TASKS, adapted, batch, layers_of, t5

D_IN, D_OUT, R, E = 7, 5, 3, 4


def factors(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    config = HydraLoRAConfig(**{"r": R, "lora_alpha": 6, "num_experts": E, **fields})
    layer = HydraLoRAFactors(D_IN, D_OUT, config).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype)


def tokens(dtype=torch.float64):
    return torch.randn(2, 4, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


class Released(nn.Module):
    """The layer after the authors' peft/tuners/lora.py (github.com/Clin0212/HydraLoRA): linear modules A, B_i, router.

    It is a causal language model's layer, so x is ``[B, S, d_in]``. One dropout mask serves all experts here.
    """

    def __init__(self, weights: dict[str, torch.Tensor], scaling: float) -> None:
        super().__init__()
        self.down, self.route = nn.Linear(D_IN, R, bias=False), nn.Linear(D_IN, E, bias=False)
        self.up = nn.ModuleList(nn.Linear(R, D_OUT, bias=False) for _ in range(E))
        self.double().scaling = scaling
        self.down.weight.data, self.route.weight.data = weights["A"].clone(), weights["router"].clone()
        for up, weight in zip(self.up, weights["B"], strict=True):
            up.weight.data = weight.clone()

    def forward(self, x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        shares, result = functional.softmax(self.route(x), dim=-1), x.new_zeros(*x.shape[:-1], D_OUT)
        for i, up in enumerate(self.up):
            result = result + shares[:, :, i].unsqueeze(-1) * up(self.down(dropped)) * self.scaling
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_every_gradient_equal_the_released_layer(dropout):
    layer, inputs, plain = factors(lora_dropout=dropout), tokens().requires_grad_(), tokens().requires_grad_()
    released = Released({name: value.detach() for name, value in layer.named_parameters()}, 6 / R)
    base = torch.randn(2, 4, D_OUT, dtype=torch.float64)
    torch.manual_seed(5)
    output, aux, weights = layer(base.clone(), inputs, None)
    torch.manual_seed(5)
    expected = base + released(plain, functional.dropout(plain, dropout))
    assert aux is None
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, (plain @ layer.router.T).softmax(-1).detach())
    (output**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(inputs.grad, plain.grad)
    torch.testing.assert_close(layer.A.grad, released.down.weight.grad)
    torch.testing.assert_close(layer.router.grad, released.route.weight.grad)
    torch.testing.assert_close(layer.B.grad, torch.stack([up.weight.grad for up in released.up]))


def test_fp32_is_close_to_float64():
    results = []
    for dtype in (torch.float64, torch.float32):
        layer, inputs = factors(dtype), tokens(dtype).requires_grad_()
        output = layer(torch.zeros(2, 4, D_OUT, dtype=dtype), inputs, None)[0]
        (output**2).sum().backward()
        results.append([output.detach(), inputs.grad, *(p.grad for p in layer.parameters())])
    for number, (exact, single) in enumerate(zip(*results, strict=True)):
        assert (single - exact).norm() / exact.norm() < (1e-4 if number else 1e-5)


def test_one_up_projection_is_lora():
    layer, inputs = factors(num_experts=1), tokens()
    output = layer(torch.zeros(2, 4, D_OUT, dtype=torch.float64), inputs, None)[0]
    torch.testing.assert_close(output, 6 / R * inputs @ (layer.B[0] @ layer.A).T)


def test_gate_statistics():
    model = adapted("hydralora", t5())
    model(**batch())
    statistics = model.gate_statistics()
    assert statistics.keys() == layers_of(model).keys()
    for weights in statistics.values():
        assert weights.shape == (3,)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_merging_raises():
    model = adapted("hydralora", t5())
    with pytest.raises(NotImplementedError, match="gate depends on the token"):
        model.merge_and_unload()


def test_config():
    config = HydraLoRAConfig(r=4)
    assert (config.num_experts, config.lora_alpha) == (3, 24)
    for value in (0, 1.5, True, None):
        with pytest.raises(ValueError, match="num_experts"):
            HydraLoRAConfig(num_experts=value)
    common = {"r": 4, "lora_alpha": None, "lora_dropout": 0.0, "target_modules": ["q"]}
    config = adapter_method("hydralora").make_config(common, TrainConfig(), [*TASKS, "other"])
    assert (config.num_experts, config.lora_alpha) == (4, 32)
