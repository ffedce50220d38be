"""Small towers of every architecture in open_clip."""

from __future__ import annotations

from typing import Any

import torch

from lvlm_clorae.models.vision import VisionTower
from tests.helpers.tiny import TOWER

LAYERS = 3
VIT = {**TOWER, "layers": LAYERS}
RESNET = {"layers": (1, 2, 1, 1), "width": 8, "head_width": 8, "image_size": 64}
TIMM_VIT = {"timm_model_name": "test_vit", "image_size": 160}
CONVNEXT = {"timm_model_name": "test_convnext", "image_size": 64}
TOWERS = {"vit": VIT, "resnet": RESNET, "timm_vit": TIMM_VIT, "convnext": CONVNEXT}
SMALLEST = "ViT-S-32-alt"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)


def tower(architecture: str = "vit", layer: int = -2, **changes: Any) -> VisionTower:
    """Build a tower without zero weights, which open_clip gives to parts of a ResNet."""
    torch.manual_seed(0)
    found = VisionTower({**TOWERS[architecture], **changes}, layer=layer)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found


def clip_state(vision: VisionTower) -> dict[str, torch.Tensor]:
    """Return the state of a CLIP with this tower, with placeholders for the text tower."""
    state = {f"visual.{name}": tensor for name, tensor in vision.trunk.state_dict().items()}
    return {**state, "text_projection": torch.zeros(4, 4), "logit_scale": torch.tensor(1.0)}


def same_weights(found: VisionTower, expected: VisionTower) -> bool:
    state = found.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
