"""Cross-entropy over target tokens, with a divisor that can cover other ranks and micro-batches."""

from torch import Tensor
from torch.nn import functional


def token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None = None) -> Tensor:
    """Return the sum over target tokens divided by their number, or by the given number, in fp32.

    Args:
        logits: ``[B, T, vocabulary]``
        labels: ``[B, T]``, -100 for tokens that do not count.
        num_items_in_batch: divisor instead of this batch's number of target tokens; transformers' name for it.
    """
    total = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
