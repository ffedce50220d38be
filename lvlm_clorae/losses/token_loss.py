"""Cross-entropy over target tokens, by a divisor that may count those of other ranks and micro-batches too."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None = None) -> Tensor:
    """The sum over target tokens, divided by their number or by the number given; in fp32.

    Args:
        logits: ``[B, T, vocabulary]``
        labels: ``[B, T]``, -100 where nothing is learnt
        num_items_in_batch: divisor instead of this batch's own number of target tokens, as transformers calls it
    """
    total = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
