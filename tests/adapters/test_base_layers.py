"""Every kind of base layer that can be adapted, and torch.compile over the adapted layer."""

from __future__ import annotations

import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from lvlm_clorae import CLoRAEConfig
from tests.adapters.methods import METHODS, adapted, batch, choose, gradients, layers_of, side_loss, t5

D_IN, D_OUT = 64, 48


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(D_IN, D_IN), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.before(x)).tanh()


def linear(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D_IN, D_OUT, bias=bias)


def conv1d() -> Conv1D:
    torch.manual_seed(0)
    return Conv1D(D_OUT, D_IN)


def quantised(kind: str) -> nn.Module:
    layer = {
        "8bit": lambda: bnb.nn.Linear8bitLt(D_IN, D_OUT, bias=False, has_fp16_weights=False),
        "4bit": lambda: bnb.nn.Linear4bit(D_IN, D_OUT, bias=False, quant_type="nf4", compute_dtype=torch.float32),
    }[kind]()
    layer.load_state_dict(linear(bias=False).state_dict())
    return layer.to("cpu")  # quantises


LAYERS = {
    "linear": lambda: linear(bias=False),
    "linear with bias": lambda: linear(bias=True),
    "conv1d": conv1d,
    "8bit": lambda: quantised("8bit"),
    "4bit": lambda: quantised("4bit"),
}


def x() -> torch.Tensor:
    return torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_output_is_the_base_layers_plus_the_adapters_and_the_input_has_both_gradients(method, kind):
    torch.manual_seed(1)
    model = adapted(method, Net(LAYERS[kind]()), target_modules=["layer"]).train()
    (layer,) = layers_of(model).values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes: of its casts
        inputs = x().requires_grad_()
        whole = layer(inputs)
        whole.backward(torch.ones_like(whole))

        # The same in two parts: the base layer alone, and the adapter on an output of zeros.
        apart = x().requires_grad_()
        base = layer.base_layer(apart)
        base.backward(torch.ones_like(base))
        delta, _, _ = layer.adapters["default"](torch.zeros_like(base), apart, 0)
        delta.backward(torch.ones_like(delta))
        torch.testing.assert_close(whole, base + delta)
        torch.testing.assert_close(inputs.grad, apart.grad)

        model.zero_grad()
        (model(x()).sum() + side_loss(model)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (model.base_model.prefix in name), name


@pytest.mark.parametrize(("kind", "limit"), [("8bit", 0.02), ("4bit", 0.15)])
def test_a_quantised_base_is_near_the_exact_one(kind, limit):
    outputs = []
    for layer in (linear(False), quantised(kind)):
        torch.manual_seed(1)  # alike but for the base layer
        model = adapted("clorae", Net(layer), target_modules=["layer"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs.append(model(x()))
    assert 0 < (outputs[1] - outputs[0]).norm() / outputs[0].norm() < limit


def test_an_output_that_somebody_keeps_for_backward_is_not_overwritten_in_silence():
    model = adapted("clorae", Net(linear(False)), target_modules=["layer"])
    (layer,) = layers_of(model).values()
    layer.base_layer.register_forward_hook(lambda module, args, output: output.exp())  # keeps what it returns
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x().requires_grad_()).sum().backward()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_loaded_quantised_trains_and_is_loaded_again(method, bits, tmp_path):
    """The way PEFT's users go: from_pretrained, prepare_model_for_kbit_training, get_peft_model."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    settings = BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(load_in_4bit=True, **nf4)
    sizes = {"vocab_size": 40, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "base", quantization_config=settings)
        return peft.prepare_model_for_kbit_training(
            loaded, gradient_checkpointing_kwargs={"use_reentrant": False}
        ).train()

    model = adapted(method, base())
    kinds = {type(layer.base_layer).__name__ for layer in layers_of(model).values()}
    assert kinds == {"Linear8bitLt" if bits == 8 else "Linear4bit"}
    (model(**batch()).loss + side_loss(model)).backward()
    found = gradients(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() and torch.count_nonzero(gradient) for gradient in found.values())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    choose(again, "mner")
    assert torch.equal(again.eval()(**batch()).logits, model.eval()(**batch()).logits)


class ValuesAskedFor(TorchDispatchMode):
    """The tensors whose value the host asked for: on a GPU each would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_task_a_batch_asks_no_device_for_a_value(method, dropout):
    model = adapted(method, t5(), task=None, lora_dropout=dropout).train()
    layers, x = layers_of(model).values(), torch.randn(2, 5, 16)
    valid = torch.ones(2, 5)
    with ValuesAskedFor() as asked:
        choose(model, "mre")
        model.base_model._context.begin(model, (), {})
        for layer in layers:
            layer.masks.own = layer.masks.encoder = valid
            layer(x).sum().backward(retain_graph=True)
        model.base_model._context.end(model, (), None)
        side_loss(model).sum()
    # C-LoRAE draws a seed a layer for its dropout mask, from the CPU's generator: a scalar of its own
    assert all(value.dtype == torch.int64 and value.dim() == 0 for value in asked.found)
    assert len(asked.found) == (len(layers) if dropout and method == "clorae" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compile_with_fullgraph(dropout):
    config = CLoRAEConfig(tasks=["mner", "mre"], r=8, target_modules=["layer"], lora_dropout=dropout)
    model = peft.get_peft_model(Net(linear(False)), config).double().train()
    choose(model, "mre")
    (layer,) = layers_of(model).values()
    nn.init.normal_(layer.adapters["default"].expert_B)
    compiled = torch.compile(layer, fullgraph=True)
    inputs = [x().double().requires_grad_() for _ in range(2)]
    torch.manual_seed(0)
    outputs = [layer(inputs[0]), compiled(inputs[1])]
    for output in outputs:
        output.square().sum().backward()
    if dropout:  # another mask
        assert not torch.equal(*outputs)
        torch.testing.assert_close(compiled.eval()(x().double()), layer.eval()(x().double()))
    else:
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
