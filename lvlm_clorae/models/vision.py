"""The frozen CLIP vision tower, through open_clip."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import nn

from ..errors import UserError, nearest


class VisionTower(nn.Module):
    """Patch tokens of one layer of an open_clip vision transformer, always in eval mode and without gradients.

    Args:
        model: an open_clip model name (``"ViT-B-32"``), or a mapping of ``open_clip.CLIPVisionCfg`` fields for a tower
            of one's own.
        pretrained: a pretrained tag or a local weight file of open_clip; None leaves the weights to a checkpoint.
        layer: the block whose output is taken; -2 is LLaVA's choice.

    Raises:
        UserError: open_clip does not know the model, or its tower has no patch tokens.
    """

    def __init__(self, model: str | dict[str, Any], pretrained: str | None = None, layer: int = -2) -> None:
        super().__init__()
        if isinstance(model, dict):
            trunk = open_clip.model._build_vision_tower(model.get("width", 768), open_clip.CLIPVisionCfg(**model))
        else:
            if model not in open_clip.list_models():
                raise UserError(f'open_clip has no vision model "{model}".{nearest(model, open_clip.list_models())}')
            trunk = _vision_part(model, pretrained)
        if not hasattr(trunk, "forward_intermediates") or not hasattr(trunk, "transformer"):
            raise UserError(
                f"the open_clip model {model} has no transformer vision tower with patch tokens; choose a ViT."
            )
        self.trunk = trunk
        self.layer = layer % trunk.transformer.layers
        self.width: int = trunk.transformer.width
        self.image_size: int = trunk.image_size[0]
        self.grid: int = trunk.grid_size[0]
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VisionTower:
        """Stay in eval mode without gradients: the tower is frozen, also where ``from_pretrained`` made its weights."""
        self.requires_grad_(False)
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``pixel_values [B, 3, H, W]`` -> patch tokens ``[B, grid * grid, width]``, row by row, no class token."""
        found = self.trunk.forward_intermediates(
            pixel_values, indices=[self.layer], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        return found["image_intermediates"][0]


def _vision_part(model: str, pretrained: str | None) -> nn.Module:
    if pretrained is not None:
        return open_clip.create_model(model, pretrained=pretrained, weights_only=True).visual
    # create_model cannot build on the meta device, where from_pretrained makes the modules it then fills.
    config = open_clip.get_model_config(model)
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    return open_clip.model._build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
