"""Behaviour of a PEFT method, tested for all of ours (after PEFT's own tests/testing_common.py)."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re

import peft
import pytest
import torch
from safetensors.torch import load_file

from lvlm_clorae.adapters.register import adapter_method
from tests.helpers.adapters import (
    METHODS,
    adapted,
    aux_loss,
    batch,
    gradients,
    layers_of,
    llama,
    make_config,
    set_task,
    t5,
)

pytestmark = pytest.mark.parametrize("method", METHODS)
bases = pytest.mark.parametrize("base", [t5, llama])


@bases
@torch.no_grad()
def test_new_adapter_leaves_the_base_output_unchanged(method, base):
    expected = base().eval()(**batch()).logits
    model = peft.get_peft_model(base(), make_config(method)).eval()
    set_task(model, "mre")
    assert torch.equal(model(**batch()).logits, expected)


@bases
@pytest.mark.parametrize("target", [None, ["q", "q_proj"], r".*\.(q|q_proj)", "all-linear"])
def test_targets(method, base, target):
    model = adapted(method, base(), target_modules=target)
    names = {name.rsplit(".", 1)[-1] for name in layers_of(model)}
    if target is None:
        assert names == ({"q", "v"} if base is t5 else {"q_proj", "v_proj"})
    elif target == "all-linear":
        assert names >= ({"q", "k", "v", "o", "wi", "wo"} if base is t5 else {"q_proj", "o_proj", "down_proj"})
        assert "lm_head" not in names
    else:
        assert names == ({"q"} if base is t5 else {"q_proj"})
    model(**batch()).loss.backward()


def test_exclude_modules_and_layers_to_transform(method):
    model = adapted(
        method, llama(), target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=["v_proj"]
    )
    assert list(layers_of(model)) == ["model.layers.1.self_attn.q_proj"]


@bases
def test_exactly_the_adapter_parameters_have_gradients(method, base, capsys):
    model = adapted(method, base()).train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(model.base_model.prefix in name for name in trainable)
    (model(**batch()).loss + aux_loss(model)).backward()
    found = gradients(model)
    assert found.keys() == trainable
    assert all(torch.count_nonzero(gradient) for gradient in found.values())
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {count:,}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@bases
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True, "lora_alpha": 3}])
def test_save_and_load_preserve_the_output(method, base, fields, tmp_path):
    model = adapted(method, base(), **fields).eval()
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    own = {key for key in stored if model.base_model.prefix in key}
    assert all(re.fullmatch(rf"base_model\.model\..*\.{method}_\w+\.\w+", key) for key in own)
    assert len(stored.keys() - own) == ("modules_to_save" in fields)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == method.upper()
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    set_task(again, "mner")
    assert torch.equal(again(**batch()).logits, expected)
    assert not any(p.requires_grad for p in again.parameters())
    assert any(
        p.requires_grad for p in peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).parameters()
    )


@torch.no_grad()
def test_disable_adapter_and_unload_give_the_base_output(method):
    expected = t5().eval()(**batch()).logits
    model = adapted(method, t5()).eval()
    assert not torch.allclose(model(**batch()).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, expected)
    bare = model.unload()
    assert torch.equal(bare(**batch()).logits, expected)
    assert not any(module._forward_pre_hooks for module in bare.modules())


def test_add_set_save_and_delete_a_second_adapter(method, tmp_path):
    model = adapted(method, t5()).eval()
    first = model(**batch()).logits
    model.add_adapter("second", make_config(method, r=2, target_modules=["q", "k"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(".second." in name for name in trainable)
    set_task(model, "mner")
    assert torch.equal(model(**batch()).logits, first)
    model.set_adapter("second")
    assert not torch.allclose(model(**batch()).logits, first)  # the new adapter adds nothing
    assert all(".second." in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    assert torch.equal(model(**batch()).logits, first)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
    model.delete_adapter("second")
    assert torch.equal(model(**batch()).logits, first)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_preserves_gradients(method, dropout):
    results = []
    for checkpointing in (False, True):
        model = adapted(method, t5(dropout), lora_dropout=dropout).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(7)
        loss = model(**batch()).loss
        (loss + 0.5 * aux_loss(model)).backward()
        results.append((loss, gradients(model)))
    torch.testing.assert_close(*(loss for loss, _ in results))
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@bases
def test_generation_is_the_same_with_and_without_cache(method, base):
    model = adapted(method, base()).eval()
    inputs = {"input_ids": batch()["input_ids"], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(method, dtype):
    model = adapted(method, t5().to(dtype)).train()
    output = model(**batch())
    assert output.logits.dtype == dtype
    (output.loss + aux_loss(model)).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


def test_deepcopy_and_pickle(method):
    model = adapted(method, t5()).train()
    (model(**batch()).loss + aux_loss(model)).backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(**batch()).logits, model.eval()(**batch()).logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("r", value) for value in (0, 2.5, True, "4", None)),
        *(("lora_alpha", value) for value in (0, -1, math.nan, math.inf, True, "8")),
        *(("lora_dropout", value) for value in (-0.1, 1.0, math.nan, True, None)),
        *(("expert_r", value) for value in (0, 2.5, True, "4")),
    ],
)
def test_invalid_values_are_refused_when_constructed_and_when_loaded(method, field, value, tmp_path):
    config = make_config(method)
    if not hasattr(config, field):
        pytest.skip(f"{method} has no {field}")
    with pytest.raises(ValueError, match=rf"{field}={re.escape(repr(value))} must be "):
        make_config(method, **{field: value})
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=field):
        peft.PeftConfig.from_pretrained(tmp_path)


def test_descriptor_agrees_with_the_model(method):
    described, model = adapter_method(method), adapted(method, t5())
    assert described.name == method
    assert isinstance(model.base_model, described.model_cls)
    assert isinstance(model.peft_config["default"], described.config_cls)
    assert described.knows_tasks == hasattr(model.base_model, "set_task")
    assert (described.aux_loss is not None) == hasattr(model.base_model, "aux_loss") == (described.aux_numbers > 0)


def test_error_names_an_unsupported_layer(method):
    with pytest.raises(TypeError, match=r"shared.*Embedding"):
        adapted(method, t5(), target_modules=["shared"])
