"""Quantized bases on the CPU: layers, dtypes, loss, gradients and sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import load_model
from lvlm_clorae.models.parts import TOWERS, language_names, part_sizes
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig
from tests.helpers.tiny import noise_image, save_plain_t5, save_tiny
from tests.helpers.tiny_causal import save_language, save_llava, save_tower
from tests.helpers.tiny_image_text import save_qwen

FLAGS = {"load_in_8bit": (bnb.nn.Linear8bitLt, torch.int8), "load_in_4bit": (bnb.nn.Linear4bit, torch.uint8)}
BASES: dict[str, Callable[[Path], Any]] = {
    "own t5": save_tiny,
    "plain t5": lambda path: save_plain_t5(path, own_head=True),
    "causal": save_language,
    "llava": save_llava,
    "qwen2.5-vl": save_qwen,
}


@pytest.fixture(scope="module", params=list(BASES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Save a base; return its directory and the options to load it with."""
    directory = tmp_path_factory.mktemp("base")
    BASES[request.param](directory)
    options = {"vision": save_tower(directory / "tower")} if request.param in ("plain t5", "causal") else {}
    return str(directory), options


def load(base: tuple[str, dict[str, Any]], **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)  # of a newly initialized projector
    return load_model(base[0], **base[1], **more)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_linear_layers_of_the_language_model_are_quantized(
    base: tuple[str, dict[str, Any]], flag: str, dtype: torch.dtype
) -> None:
    model, _ = load(base, dtype=dtype, **{flag: True})
    layer_class, stored = FLAGS[flag]
    inside = tuple(f"{name}." for name in language_names(model))
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        stays = not name.startswith(inside) or module is head or name.endswith((".wo", "lm_head"))
        assert isinstance(module, layer_class) != stays, name
        assert module.weight.dtype == (dtype if stays else stored), name
    others = {p.dtype for p in model.parameters() if p.dtype != stored}
    assert others == {dtype}, "norms, embeddings, projector and tower are in the compute type"


def dequantized(model: Any) -> Any:
    """Replace the quantized layers by plain ones with the same values."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.float() * module.weight.SCB[:, None] / 127
        else:
            continue
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight.data = weight.float()
        if module.bias is not None:
            plain.bias.data = module.bias.data
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    model.is_loaded_in_8bit = model.is_loaded_in_4bit = False
    return model


def with_experts(model: Any) -> Any:
    """Add an adapter with random weights from a fixed seed; beta 0 leaves out the MIM term and its parameters."""
    model = add_adapter(model, TrainConfig(lora_rank=4, lora_dropout=0.0, beta=0.0), ["mner"])
    model.set_task("mner")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clorae_experts" in name:
                parameter.normal_(std=0.05)
    return model


@pytest.mark.parametrize(("flag", "allowed"), [("load_in_8bit", 0.05), ("load_in_4bit", 1e-3)])
def test_loss_and_gradients_are_those_of_the_dequantized_weights(
    base: tuple[str, dict[str, Any]], flag: str, allowed: float
) -> None:
    """LLM.int8 rounds activations too; nf4 does not."""
    found = {}
    for plain in (False, True):
        model, processor = load(base, **{flag: True})
        model = with_experts((dequantized(model) if plain else model).train())
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loss = model(**processor(["entities. text: Mara sings"], [noise_image()], None, ["person, Mara"])).loss
        loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in trained.values())
        found[plain] = (loss.item(), torch.cat([gradient.flatten() for gradient in trained.values()]))
    assert found[False][0] == pytest.approx(found[True][0], rel=allowed)
    assert found[True][1].norm() > 0
    assert torch.cosine_similarity(found[False][1], found[True][1], dim=0) > 1 - allowed


@pytest.mark.parametrize("flag", FLAGS)
def test_quantized_base_generates(base: tuple[str, dict[str, Any]], flag: str) -> None:
    model, processor = load(base, **{flag: True})
    model.to("cpu")  # as a run that only evaluates does
    batch = processor(["entities. text: Mara sings"], [noise_image()])
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 1


@pytest.mark.parametrize("flag", FLAGS)
def test_evaluation_does_not_affect_later_gradients(
    base: tuple[str, dict[str, Any]], flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with AVX512-BF16, simulated here, bitsandbytes would repack in eval mode and lose gradients."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True, raising=False)
    model, processor = load(base, **{flag: True})
    model = with_experts(model)
    batch = processor(["entities. text: Mara sings"], [noise_image()], None, ["person, Mara"])
    found = []
    for _ in range(2):
        torch.manual_seed(2)  # of dropout
        loss = model.train()(**batch).loss
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
        with torch.no_grad():
            model.eval()(**batch)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_reported_sizes_are_those_of_the_stored_weights() -> None:
    sizes = {}
    for flag in (None, *FLAGS):
        model, _ = load_model("demo", dtype=torch.bfloat16, **({flag: True} if flag else {}))
        sizes[flag] = part_sizes(model)["language model"]
        stored = sum(
            p.numel() * p.element_size()
            for n, p in model.named_parameters()
            if n.startswith(("shared", "encoder", "decoder"))
        )
        assert stored <= sizes[flag].bytes <= 1.1 * stored + 4096  # and scales of rows or blocks
    assert len({size.parameters for size in sizes.values()}) == 1, (
        "four bits are stored two a byte, but counted once each"
    )
    assert sizes["load_in_4bit"].bytes < sizes["load_in_8bit"].bytes < sizes[None].bytes


def test_both_quantizations_together_are_an_error() -> None:
    with pytest.raises(UserError, match="load_in_4bit"):
        load_model("demo", load_in_8bit=True, load_in_4bit=True)


def test_missing_bitsandbytes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_model("demo", load_in_8bit=True)


def test_names_inside_a_vision_tower() -> None:
    import re

    assert re.fullmatch(TOWERS, "vision_tower.trunk.conv1.weight")
    assert re.fullmatch(TOWERS, "model.visual.blocks.0.attn.qkv")
    assert not re.fullmatch(TOWERS, "encoder.visualise")
