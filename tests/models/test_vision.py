"""VisionTower: the patch tokens of the chosen layer, and frozen weights in every mode of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from torch import nn

from lvlm_clorae.models import vision as vision_module
from lvlm_clorae.models.families.t5 import VisionT5
from lvlm_clorae.models.vision import VisionTower, tower_config
from tests.helpers.tiny import tiny_config
from tests.helpers.towers import CONVNEXT, RESNET, TOWERS, VIT, tower


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def layers_of(trunk: Any, architecture: str) -> list[nn.Module]:
    if architecture == "vit":
        return list(trunk.transformer.resblocks)
    if architecture == "resnet":
        return [trunk.avgpool, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    return list(trunk.trunk.blocks if architecture == "timm_vit" else trunk.trunk.stages)


def outputs_of(modules: list[nn.Module], run: Any) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs.append(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("architecture", TOWERS)
@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 2])
def test_patch_tokens_are_the_output_of_the_chosen_layer(architecture: str, layer: int) -> None:
    vision = tower(architecture, layer)
    modules = layers_of(vision.trunk, architecture)
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
    expected = outputs_of(modules, lambda: vision.trunk(pixels))[layer]
    found = vision(pixels)
    assert found.shape == (2, vision.grid**2, vision.width)
    if expected.ndim == 4:  # [B, C, H, W]
        assert expected.shape[1:] == (vision.width, vision.grid, vision.grid)
        for row in range(vision.grid):
            for column in range(vision.grid):
                token = found[:, row * vision.grid + column]
                torch.testing.assert_close(token, expected[:, :, row, column])
    else:
        torch.testing.assert_close(found, expected[:, 1:])  # the first is the class token


@pytest.mark.parametrize("architecture", TOWERS)
def test_later_layers_are_not_run(architecture: str) -> None:
    vision = tower(architecture, layer=1)
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    assert len(outputs_of(layers_of(vision.trunk, architecture), lambda: vision(pixels))) == 2


@pytest.mark.parametrize("architecture", TOWERS)
def test_patches_are_in_row_order(architecture: str) -> None:
    """A change in the image's upper right corner changes the token at the end of the first row most."""
    vision = tower(architecture, layer=0)
    size = vision.image_size
    pixels = torch.zeros(1, 3, size, size)
    part = max(size // vision.grid, 8)
    pixels[..., :part, -part:] = 3 * torch.randn(3, part, part)
    change = (vision(pixels) - vision(torch.zeros_like(pixels))).norm(dim=-1)[0]
    row, column = divmod(int(change.argmax()), vision.grid)
    cells = -(-part * vision.grid // size)
    assert row < cells
    assert column >= vision.grid - cells


@pytest.mark.parametrize("architecture", TOWERS)
def test_tower_stays_frozen_in_train_mode(architecture: str) -> None:
    vision = tower(architecture)
    holder = nn.Sequential(vision, nn.Linear(vision.width, 4))
    holder.requires_grad_(True)
    holder.train()
    assert not any(module.training for module in vision.modules())
    assert not any(parameter.requires_grad for parameter in vision.parameters())
    assert holder[1].training
    assert holder[1].weight.requires_grad
    before = {name: tensor.clone() for name, tensor in vision.state_dict().items()}
    found = vision(torch.randn(2, 3, vision.image_size, vision.image_size, requires_grad=True))
    assert not found.requires_grad
    after = vision.state_dict()  # with the statistics of batch norms
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_forward_without_no_grad_is_trainable() -> None:
    """The recipe of the demo base uses it."""
    vision = tower().requires_grad_(True)
    type(vision).forward.__wrapped__(vision, torch.randn(1, 3, 32, 32)).sum().backward()
    assert vision.trunk.conv1.weight.grad is not None


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("ViT-L-14-quickgelu", -2, (1024, 224, 16, 22)),
        ("ViT-B-16-SigLIP", -2, (768, 224, 14, 10)),
        ("ViT-SO400M-14-SigLIP-384", -1, (1152, 384, 27, 26)),
        ("EVA02-B-16", -2, (768, 224, 14, 10)),
        ("RN50", -2, (1024, 224, 14, 3)),
        ("RN50", -1, (2048, 224, 7, 4)),
        ("RN50", 0, (64, 224, 56, 0)),
        ("RN50x4", -2, (1280, 288, 18, 3)),
        ("convnext_base_w", -2, (512, 256, 16, 2)),
        ("convnext_base_w", -1, (1024, 256, 8, 3)),
    ],
)
def test_named_tower_has_its_shape_on_the_meta_device(name: str, layer: int, shape: tuple[int, int, int, int]) -> None:
    with torch.device("meta"):
        vision = VisionTower(name, layer=layer)
        found = vision(torch.empty(1, 3, vision.image_size, vision.image_size))
    assert (vision.width, vision.image_size, vision.grid, vision.layer) == shape
    assert found.shape == (1, vision.grid**2, vision.width)


def test_named_tower_has_the_activation_of_its_name() -> None:
    with torch.device("meta"):
        quick, plain = VisionTower("ViT-L-14-quickgelu"), VisionTower("ViT-L-14")
    assert type(quick.trunk.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert type(plain.trunk.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"


@pytest.mark.slow
def test_every_architecture_in_open_clip() -> None:
    architectures: dict[str, str] = {}
    for name in open_clip.list_models():
        config = tower_config(name)
        architectures.setdefault(config.get("timm_model_name", str(type(config.get("layers")))).split("_")[0], name)
    assert len(architectures) >= 8
    for name in architectures.values():
        with torch.device("meta"):
            vision = VisionTower(name)
            found = vision(torch.empty(1, 3, vision.image_size, vision.image_size))
        assert found.shape == (1, vision.grid**2, vision.width), name


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "RN50", "ViT-B-16-SigLIP"])
def test_mapping_builds_the_same_architecture(name: str) -> None:
    config = json.loads(json.dumps(tower_config(name)))
    with torch.device("meta"):
        named, mapped = VisionTower(name), VisionTower(config)
    assert repr(named) == repr(mapped)
    shapes = {key: tensor.shape for key, tensor in named.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in mapped.state_dict().items()}


def test_timm_downloads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("timm loads weights"))
    with torch.device("meta"):
        VisionTower({**CONVNEXT, "timm_model_pretrained": True})


def test_mapping_sets_activation_and_embedding_width() -> None:
    vision = VisionTower({**VIT, "quick_gelu": True, "embed_dim": 7})
    assert type(vision.trunk.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert vision.trunk.proj.shape == (32, 7)
    assert VisionTower(VIT).trunk.proj.shape == (32, 32)


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [RESNET, CONVNEXT, {"timm_model_name": "eva02_tiny_patch14_224"}])
def test_save_and_load_keeps_the_whole_tower(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """EVA's rotary table is in no checkpoint of open_clip, and from_pretrained would leave it uninitialized."""
    torch.manual_seed(0)
    model = VisionT5(tiny_config(vision={"model": config})).to(dtype)
    model.save_pretrained(tmp_path)
    again = VisionT5.from_pretrained(tmp_path, dtype=dtype)
    state = again.vision_tower.state_dict()
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert state[name].dtype == (dtype if tensor.is_floating_point() else tensor.dtype)
    size = again.vision_tower.image_size
    pixels = torch.randn(1, 3, size, size, dtype=dtype)
    assert torch.equal(model.vision_tower(pixels), again.vision_tower(pixels))
    assert not any(parameter.requires_grad for parameter in again.vision_tower.parameters())


@pytest.mark.parametrize("architecture", TOWERS)
def test_shape_is_known_for_partitioned_parameters(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``deepspeed.zero.Init``, under which from_pretrained builds, leaves empty parameters that know their shape."""
    expected = tower(architecture)

    def partitioned(*args: Any) -> nn.Module:
        for parameter in expected.trunk.parameters():
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
        return expected.trunk

    monkeypatch.setattr(vision_module, "_build", partitioned)
    found = VisionTower(TOWERS[architecture])
    assert (found.width, found.grid, found.layer) == (expected.width, expected.grid, expected.layer)
