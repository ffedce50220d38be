"""Every type of base layer that can be adapted, and torch.compile of the adapted layer."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, T5Config, T5ForConditionalGeneration

from lvlm_clorae import CLoRAEConfig
from tests.helpers.adapters import (
    BASE_LAYERS,
    METHODS,
    Net,
    adapted,
    aux_loss,
    batch,
    gradients,
    layers_of,
    linear,
    net_input,
    quantised,
    set_task,
    t5,
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer_type", BASE_LAYERS)
def test_output_and_input_gradient_are_sums_of_base_layer_and_adapter(method, layer_type):
    torch.manual_seed(1)
    model = adapted(method, Net(BASE_LAYERS[layer_type]()), target_modules=["layer"]).train()
    (layer,) = layers_of(model).values()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes warns of casts
        inputs = net_input().requires_grad_()
        whole = layer(inputs)
        whole.backward(torch.ones_like(whole))

        # The base layer alone, and the adapter on an output of zeros
        apart = net_input().requires_grad_()
        base = layer.base_layer(apart)
        base.backward(torch.ones_like(base))
        delta, _, _ = layer.adapters["default"](torch.zeros_like(base), apart, 0)
        delta.backward(torch.ones_like(delta))
        torch.testing.assert_close(whole, base + delta)
        torch.testing.assert_close(inputs.grad, apart.grad)

        model.zero_grad()
        (model(net_input()).sum() + aux_loss(model)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (model.base_model.prefix in name), name


@pytest.mark.parametrize(("bits", "limit"), [("8bit", 0.02), ("4bit", 0.15)])
def test_quantised_base_is_close_to_exact_base(bits, limit):
    outputs = []
    for layer in (linear(False), quantised(bits)):
        torch.manual_seed(1)  # the base layers alone differ
        model = adapted("clorae", Net(layer), target_modules=["layer"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs.append(model(net_input()))
    assert 0 < (outputs[1] - outputs[0]).norm() / outputs[0].norm() < limit


def test_overwriting_an_output_saved_for_backward_raises():
    model = adapted("clorae", Net(linear(False)), target_modules=["layer"])
    (layer,) = layers_of(model).values()
    layer.base_layer.register_forward_hook(lambda module, args, output: output.exp())  # saves what it returns
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(net_input().requires_grad_()).sum().backward()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_model_trains_saves_and_loads(method, bits, tmp_path):
    """PEFT's usual path: from_pretrained, prepare_model_for_kbit_training, get_peft_model."""
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
    types = {type(layer.base_layer).__name__ for layer in layers_of(model).values()}
    assert types == {"Linear8bitLt" if bits == 8 else "Linear4bit"}
    (model(**batch()).loss + aux_loss(model)).backward()
    found = gradients(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() and torch.count_nonzero(gradient) for gradient in found.values())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    set_task(again, "mner")
    assert torch.equal(again.eval()(**batch()).logits, model.eval()(**batch()).logits)


class HostReads(TorchDispatchMode):
    """Record the tensors whose value the host reads: on a GPU each read waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_task_per_batch_needs_no_device_synchronisation(method, dropout):
    model = adapted(method, t5(), task=None, lora_dropout=dropout).train()
    layers, x = layers_of(model).values(), torch.randn(2, 5, 16)
    valid = torch.ones(2, 5)
    with HostReads() as reads:
        set_task(model, "mre")
        model.base_model._context.begin(model, (), {})
        for layer in layers:
            layer.masks.read(layer, (), {"attention_mask": valid, "encoder_attention_mask": valid})
            layer(x).sum().backward(retain_graph=True)
        model.base_model._context.end(model, (), None)
        aux_loss(model).sum()
    # C-LoRAE takes a seed per layer for its dropout mask from the CPU's generator: a CPU scalar
    assert all(value.dtype == torch.int64 and value.dim() == 0 for value in reads.found)
    assert len(reads.found) == (len(layers) if dropout and method == "clorae" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_layer_equals_the_fused_one(dropout):
    config = CLoRAEConfig(tasks=["mner", "mre"], r=8, target_modules=["layer"], lora_dropout=dropout)
    model = peft.get_peft_model(Net(linear(False)), config).double().train()
    set_task(model, "mre")
    (layer,) = layers_of(model).values()
    nn.init.normal_(layer.adapters["default"].expert_B)
    compiled = torch.compile(layer, fullgraph=True)
    inputs = [net_input().double().requires_grad_() for _ in range(2)]
    torch.manual_seed(0)
    outputs = [layer(inputs[0]), compiled(inputs[1])]
    for output in outputs:
        output.square().sum().backward()
    if dropout:  # the masks differ
        assert not torch.equal(*outputs)
        torch.testing.assert_close(compiled.eval()(net_input().double()), layer.eval()(net_input().double()))
    else:
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
