"""The vision tower: the patch tokens of the chosen block, frozen whatever is done to the model around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.vision import VisionTower
from tests.models.tiny import TOWER

LAYERS = 3


def tower(layer: int = -2) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower({**TOWER, "layers": LAYERS}, layer=layer)


@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 2])
def test_patch_tokens_are_the_output_of_the_chosen_block(layer: int) -> None:
    vision = tower(layer)
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs.append(output)

    blocks = vision.trunk.transformer.resblocks
    handles = [block.register_forward_hook(keep) for block in blocks]
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        vision.trunk(pixels)
    for handle in handles:
        handle.remove()
    assert len(outputs) == LAYERS
    expected = outputs[layer]
    if not vision.trunk.transformer.batch_first:
        expected = expected.transpose(0, 1)
    found = vision(pixels)
    assert found.shape == (2, 4, 32) == (2, vision.grid**2, vision.width)
    torch.testing.assert_close(found, expected[:, 1:])  # the first is the class token


def test_patches_stand_row_by_row() -> None:
    """A change of the picture's upper right quarter changes the second token most, in the first block's output."""
    vision = tower(layer=0)
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., :16, 16:] = 3 * torch.randn(3, 16, 16)
    change = (vision(pixels) - vision(torch.zeros_like(pixels))).norm(dim=-1)[0]
    assert change.argmax() == 1


def test_the_tower_is_frozen_whatever_its_model_does() -> None:
    holder = nn.Sequential(tower(), nn.Linear(32, 4))
    holder.requires_grad_(True)
    holder.train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(parameter.requires_grad for parameter in holder[0].parameters())
    assert holder[1].training
    assert holder[1].weight.requires_grad
    found = holder[0](torch.randn(1, 3, 32, 32, requires_grad=True))
    assert not found.requires_grad


def test_a_named_tower_has_open_clips_shape_and_can_be_made_without_memory() -> None:
    with torch.device("meta"):
        vision = VisionTower("ViT-L-14-quickgelu")
    assert (vision.width, vision.image_size, vision.grid, vision.layer) == (1024, 224, 16, 22)
    assert type(vision.trunk.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_towers_without_patch_tokens_and_unknown_names_are_user_errors() -> None:
    with pytest.raises(UserError, match=r'no vision model "ViT-B-23".*Did you mean "ViT-B-'):
        VisionTower("ViT-B-23")
    with torch.device("meta"), pytest.raises(UserError, match=r"RN50 has no transformer vision tower.*choose a ViT"):
        VisionTower("RN50")
