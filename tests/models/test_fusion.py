"""GatedFusion: its formulas in float64, rows without an image, initialization, and training with adapters."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config

from lvlm_clorae import CLoRAEConfig
from lvlm_clorae.models.fusion import GatedFusion
from tests.helpers.tiny import T5, tiny_batch, tiny_model

ROWS, LENGTH, PATCHES, WIDTH = 6, 5, 9, T5["d_model"]
SHOWN = torch.tensor([1, 1, 0, 1, 1, 1])


def fusion_of(activation: str = "gated-gelu") -> GatedFusion:
    """Build a fusion without dropout and with weights of one scale, so that every part matters."""
    fusion = GatedFusion(T5Config(**T5, vocab_size=11, feed_forward_proj=activation)).eval().double()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return fusion


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Build text with padding in three rows (on the left in one), and images for all rows but one."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=dtype)
    visual = torch.randn(ROWS, PATCHES, WIDTH, generator=generator, dtype=dtype)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, 3:] = mask[1, 1:] = mask[3, :2] = 0
    return text, mask, visual, SHOWN


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + layer.variance_epsilon) * layer.weight


def attend(queries: Tensor, keys: Tensor, layer: nn.Module, bias: Tensor | float) -> Tensor:
    """Compute T5's unscaled attention of ``[L, d]`` over ``[K, d]`` with ``bias [heads, L, K]``."""
    heads = T5["num_heads"]
    q, k, v = (
        (x @ weight.T).reshape(len(x), heads, -1)
        for x, weight in ((queries, layer.q.weight), (keys, layer.k.weight), (keys, layer.v.weight))
    )
    shares = torch.softmax(torch.einsum("qhc,khc->hqk", q, k) + bias, -1)
    return torch.einsum("hqk,khc->qhc", shares, v).reshape(len(queries), -1) @ layer.o.weight.T


def feed_forward(x: Tensor, layer: nn.Module) -> Tensor:
    inner, x = layer.DenseReluDense, norm(x, layer.layer_norm)
    if hasattr(inner, "wi"):
        return torch.relu(x @ inner.wi.weight.T) @ inner.wo.weight.T
    gate = x @ inner.wi_0.weight.T
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * (x @ inner.wi_1.weight.T)) @ inner.wo.weight.T


def encoded(fusion: GatedFusion, visual: Tensor) -> Tensor:
    """Compute the visual tokens ``[P, d]`` of one row after their two blocks."""
    stack = fusion.visual_encoder
    bias = stack.block[0].layer[0].SelfAttention.compute_bias(PATCHES, PATCHES)[0]
    for block in stack.block:
        attention, forward = block.layer
        normed = norm(visual, attention.layer_norm)
        visual = visual + attend(normed, normed, attention.SelfAttention, bias)
        visual = visual + feed_forward(visual, forward)
    return norm(visual, stack.final_layer_norm)


def rate_of(fusion: GatedFusion, valid_text: Tensor, visual: Tensor) -> Tensor:
    of_text = (valid_text @ fusion.proj_t[0].weight.T @ fusion.proj_t[1].weight.T).mean(0)
    of_visual = (visual @ fusion.proj_v[0].weight.T @ fusion.proj_v[1].weight.T).mean(0)
    similarity = math.exp(0.5) * (of_text @ of_visual) / (of_text.norm() * of_visual.norm())
    return similarity if similarity > 0 else 0.01 * similarity


def fused_row(fusion: GatedFusion, text: Tensor, mask: Tensor, visual: Tensor, shown: Tensor) -> Tensor:
    if not shown:
        return text
    visual = encoded(fusion, visual)
    layer = fusion.cross_attention
    update = text + attend(norm(text, layer.layer_norm), visual, layer.EncDecAttention, 0.0)
    update = update + feed_forward(update, fusion.feed_forward)
    return text + rate_of(fusion, text[mask == 1], visual) * update


@pytest.mark.parametrize("activation", ["gated-gelu", "relu"])
def test_values_and_gradients_are_those_of_the_formulas(activation: str) -> None:
    fusion, (text, mask, visual, shown) = fusion_of(activation), inputs()
    weights = torch.randn(text.shape, generator=torch.Generator().manual_seed(2), dtype=text.dtype)
    leaves = [text.requires_grad_(), visual.requires_grad_(), *fusion.parameters()]

    found = fusion(text, mask, visual, shown)
    expected = torch.stack([fused_row(fusion, *row) for row in zip(text, mask, visual, shown, strict=True)])
    # transformers computes a layer norm's mean square in fp32 for any dtype; so is our gate.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found_gradients = torch.autograd.grad((found * weights).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert other.abs().max() > 1e-3, "a gradient that is hardly there would show nothing"

    with torch.no_grad():
        rates = [
            float(rate_of(fusion, t[m == 1], encoded(fusion, v))) for t, m, v in zip(text, mask, visual, strict=True)
        ]
    assert max(rates) > 0.05, "both signs of the similarity"
    assert min(rates) < -0.01 * 0.05


def test_row_without_an_image_is_unchanged() -> None:
    fusion, (text, mask, visual, _) = fusion_of(), inputs()
    text.requires_grad_()
    for stand_in in (visual, torch.zeros_like(visual), 1e6 * visual):
        fusion.zero_grad()
        fused = fusion(text, mask, stand_in, torch.zeros(ROWS))
        assert torch.equal(fused, text)
        (gradient,) = torch.autograd.grad((2 * fused).sum(), text, retain_graph=True)
        assert torch.equal(gradient, torch.full_like(text, 2))
        fused.sum().backward()
        for name, parameter in fusion.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_row_without_valid_tokens_is_finite() -> None:
    fusion, (text, mask, visual, shown) = fusion_of(), inputs()
    fused = fusion(text, torch.zeros_like(mask), visual, shown)
    fused.sum().backward()
    assert torch.equal(fused, text), "the similarity of a zero mean is 0"
    assert all(torch.isfinite(parameter.grad).all() for parameter in fusion.parameters())


def test_initialization_keeps_the_scale_and_all_parameters_get_gradients() -> None:
    torch.manual_seed(0)
    width = 256
    config = T5Config(d_model=width, d_kv=32, d_ff=512, num_heads=8, feed_forward_proj="gated-gelu", vocab_size=11)
    fusion = GatedFusion(config)
    text, visual = torch.randn(4, 12, width), torch.randn(4, 16, width)
    fused = fusion(text, torch.ones(4, 12), visual, torch.ones(4))
    assert 0.5 < fused.std() < 4
    (fused * torch.randn_like(fused)).sum().backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    attention = fusion.cross_attention.EncDecAttention
    assert float(attention.q.weight.detach().std()) == pytest.approx((width * 32) ** -0.5, rel=0.1)
    assert float(attention.k.weight.detach().std()) == pytest.approx(width**-0.5, rel=0.1)
    assert float(fusion.proj_t[0].weight.detach().std()) == pytest.approx((3 * width) ** -0.5, rel=0.1)


TASKS = ["mner", "mre", "mee"]


def adapted() -> Any:
    config = CLoRAEConfig(
        tasks=TASKS,
        r=8,
        target_modules=["q", "v"],
        exclude_modules=r"(?!(encoder|decoder)\.).*",
        modules_to_save=["projector", "fusion"],
    )
    model = peft.get_peft_model(tiny_model(fusion="gated"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clorae" in name and parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.set_task("mre")
    return model


def test_adapters_projector_and_fusion_get_gradients() -> None:
    model = adapted().train()
    layers = model.base_model.adapted_layers()
    assert len(layers) == 12  # q and v of two self-attentions, two more, and two cross-attentions
    assert all(name.startswith(("encoder.", "decoder.")) for name in layers)
    (model(**tiny_batch()).loss + model.mutual_information_loss()).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    whole = {name for name in trained if "clorae" not in name}
    ours = re.compile(r"base_model\.model\.(projector|fusion)\.modules_to_save\.default\.(.+)")
    found = {ours.fullmatch(name).groups() for name in whole}
    base = tiny_model(fusion="gated")
    assert found == {
        (part, name) for part in ("projector", "fusion") for name, _ in getattr(base, part).named_parameters()
    }


def test_valid_tokens_of_adapted_layers() -> None:
    model, batch = adapted(), tiny_batch()
    model(**batch)
    for name, layer in model.base_model.adapted_layers().items():
        of_text = name.startswith("encoder.") or layer.reads_encoder
        expected = batch["attention_mask"] == 1 if of_text else batch["labels"] != -100
        assert torch.equal(layer.masks.valid(expected.unsqueeze(-1), layer.reads_encoder), expected), name


def test_save_and_load_adapters_with_projector_and_fusion(tmp_path: Path) -> None:
    model, batch = adapted().eval(), tiny_batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.01)
        expected = model(**batch).logits
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_model(fusion="gated"), tmp_path).eval()
        again.set_task("mre")
        assert torch.equal(again(**batch).logits, expected)
