"""What comes from pictures brought to the rows of a batch, and to the tokens there that stand for it."""

from __future__ import annotations

import torch


def of_rows(patches: torch.Tensor, pixel_mask: torch.Tensor) -> torch.Tensor:
    """Each row's patches ``[B, P, d]``, from those of the pictures ``[I, P, d]``; no device synchronisation.

    Args:
        patches: of the pictures of the rows whose ``pixel_mask [B]`` is 1, in their order; or of B pictures, one a row.
            A row without one gets another's, which the caller masks.
    """
    if len(patches) == len(pixel_mask):
        return patches
    return patches[(pixel_mask.cumsum(0) - 1).clamp(min=0)]


def place(embeddings: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The embeddings with the k-th slot of every row replaced by that row's k-th token; no device synchronisation.

    Args:
        embeddings: ``[B, S, d]``
        slots: ``[B, S]`` bool
        tokens: ``[B, K, d]``, K at least 1, of any floating dtype; where a row has fewer slots, its last are not used

    Returns:
        ``[B, S, d]`` in the dtype of ``embeddings``. Slots beyond the K-th get the last token again: a stray slot in a
        user's text must not end a job.
    """
    order = (slots.cumsum(-1) - 1).clamp(min=0, max=tokens.shape[1] - 1)
    at_slots = tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return torch.where(slots.unsqueeze(-1), at_slots.to(embeddings.dtype), embeddings)
