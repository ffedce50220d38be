"""From the tower's patches to the language model's embedding space: patch tokens and one token an object region."""

from __future__ import annotations

import torch
from torch import nn


def patch_weights(boxes: torch.Tensor, grid: int) -> torch.Tensor:
    """How much each patch lies under each box: ``boxes [..., 4]`` (x1, y1, x2, y2 in 0..1) -> ``[..., grid * grid]``.

    The weights of a box sum to 1; a box without area gives zeros.
    """
    edges = torch.arange(grid, device=boxes.device, dtype=boxes.dtype) / grid

    def shares(start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """How much of the side from ``start`` to ``stop`` lies in each column (or row) of patches."""
        cover = (torch.minimum(stop, edges + 1 / grid) - torch.maximum(start, edges)).clamp(min=0)
        return cover / cover.sum(-1, keepdim=True).clamp(min=1e-6)

    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(-2)
    return (shares(y1, y2).unsqueeze(-1) * shares(x1, x2).unsqueeze(-2)).flatten(-2)


class VisualProjector(nn.Module):
    """An MLP (``linear`` or LLaVA's ``mlp2x_gelu``) for patches; for regions box-pooled patches plus a box embedding.

    It is one module with one forward, so that ZeRO-3 gathers all of it together and every rank runs all of it.
    """

    def __init__(self, vision_width: int, hidden_size: int, grid: int, kind: str = "mlp2x_gelu") -> None:
        super().__init__()
        if kind == "linear":
            self.layers: nn.Module = nn.Linear(vision_width, hidden_size)
        elif kind == "mlp2x_gelu":
            self.layers = nn.Sequential(
                nn.Linear(vision_width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
            )
        else:
            raise ValueError(f'projector must be "linear" or "mlp2x_gelu", not "{kind}"')
        self.box_embedding = nn.Linear(5, hidden_size)
        self.grid = grid

    def forward(self, patches: torch.Tensor, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project patches and regions.

        Args:
            patches: ``[B, P, vision_width]``
            regions: ``[B, R, 4]`` boxes as fractions of the picture, x1, y1, x2, y2; padding has no area.

        Returns:
            visual tokens ``[B, P, hidden_size]`` and region tokens ``[B, R, hidden_size]``.
        """
        dtype = self.box_embedding.weight.dtype
        tokens = self.layers(patches.to(dtype))
        pooled = patch_weights(regions.float(), self.grid).to(dtype) @ tokens
        area = (regions[..., 2] - regions[..., 0]) * (regions[..., 3] - regions[..., 1])
        return tokens, pooled + self.box_embedding(torch.cat([regions, area.unsqueeze(-1)], -1).to(dtype))
