"""Projection of image features into the language model's embedding space, and their placement among text tokens."""

from typing import Any

import torch
from torch import Tensor, nn

IMAGE_INPUTS = ("pixel_values", "pixel_mask", "regions")
"""Names of the image inputs of a model, in the order of its arguments."""


def patch_weights(boxes: Tensor, grid: int) -> Tensor:
    """Compute the share of each box ``[..., 4]`` on each patch ``[..., grid * grid]``; 0 for boxes without area."""
    edges = torch.arange(grid, device=boxes.device, dtype=boxes.dtype) / grid

    def shares(start: Tensor, stop: Tensor) -> Tensor:
        """Compute the share of an interval in each column (or row) of patches."""
        cover = (torch.minimum(stop, edges + 1 / grid) - torch.maximum(start, edges)).clamp(min=0)
        return cover / cover.sum(-1, keepdim=True).clamp(min=1e-6)

    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(-2)
    return (shares(y1, y2).unsqueeze(-1) * shares(x1, x2).unsqueeze(-2)).flatten(-2)


class VisualProjector(nn.Module):
    """An MLP (``linear`` or LLaVA's ``mlp2x_gelu``) for patches; box-pooled patches plus a box embedding for regions.

    It is one module with one forward, so that ZeRO-3 gathers all of it at once and every rank runs all of it.
    """

    def __init__(self, vision_width: int, hidden_size: int, grid: int, projector_type: str = "mlp2x_gelu") -> None:
        super().__init__()
        if projector_type not in ("linear", "mlp2x_gelu"):
            raise ValueError(f'projector must be "linear" or "mlp2x_gelu", not "{projector_type}"')
        self.layers: nn.Module = nn.Linear(vision_width, hidden_size)
        if projector_type == "mlp2x_gelu":
            self.layers = nn.Sequential(self.layers, nn.GELU(), nn.Linear(hidden_size, hidden_size))
        self.box_embedding = nn.Linear(5, hidden_size)
        self.grid = grid

    def forward(self, patches: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Project ``patches [B, P, vision_width]`` and ``regions [B, R, 4]`` to ``[B, P, d]`` and ``[B, R, d]``."""
        dtype = self.box_embedding.weight.dtype
        tokens = self.layers(patches.to(dtype))
        pooled = patch_weights(regions.float(), self.grid).to(dtype) @ tokens
        area = (regions[..., 2] - regions[..., 0]) * (regions[..., 3] - regions[..., 1])
        return tokens, pooled + self.box_embedding(torch.cat([regions, area.unsqueeze(-1)], -1).to(dtype))


def check_text_only(*images: Tensor | None) -> None:
    """Raise ValueError if a text-only base is given image inputs."""
    if any(tensor is not None for tensor in images):
        raise ValueError("This base is text only (vision none), so it takes no pixel_values and no regions.")


def project_images(
    model: Any, pixel_values: Tensor | None, pixel_mask: Tensor, regions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run a model's tower and projector to visual tokens ``[B, P, d]`` and region tokens ``[B, R, d]``.

    Absent inputs are replaced by blanks: under ZeRO-3 every rank has to run the same modules.
    """
    if pixel_values is None:
        size = model.vision_tower.image_size
        pixel_values = torch.zeros(1, 3, size, size, device=pixel_mask.device)
    if regions is None:
        regions = torch.zeros(len(pixel_mask), 1, 4, device=pixel_mask.device)
    patches = expand_to_rows(model.vision_tower(pixel_values.to(model.dtype)), pixel_mask)
    return model.projector(patches, regions)


def expand_to_rows(patches: Tensor, pixel_mask: Tensor) -> Tensor:
    """Expand the patches ``[I, P, d]`` of the rows in ``pixel_mask [B]``, or of all, to ``[B, P, d]`` without a sync.

    A row without an image gets another row's patches, which the caller masks.
    """
    if len(patches) == len(pixel_mask):
        return patches
    return patches[(pixel_mask.cumsum(0) - 1).clamp(min=0)]


def scatter_tokens(embeddings: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Replace the k-th position of a row in ``mask [B, S]`` by the k-th of its ``tokens [B, K, d]``, K >= 1.

    Positions beyond the K-th get the last token again, so that a stray placeholder in a text does not end a job.
    """
    order = (mask.cumsum(-1) - 1).clamp(min=0, max=tokens.shape[1] - 1)
    ordered = tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return torch.where(mask.unsqueeze(-1), ordered.to(embeddings.dtype), embeddings)
