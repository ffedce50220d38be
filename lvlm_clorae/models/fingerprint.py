"""The fingerprint of a base: which weights an adapter was trained on."""

import hashlib
from typing import Any

import torch

from ..errors import UserError
from .parts import part_of

HASHED_VALUES, HASHED_FROM = 8, 8192
"""This many values of weights of at least this size are hashed: rank 0 has them under ZeRO-3."""


def base_fingerprint(model: Any) -> dict[str, str]:
    """Return a hash of each part of a base without adapter, as loaded. Under ZeRO-3 only rank 0's is complete.

    It covers the shapes of all weights and the first values of large ones, rounded to bf16, so that it is the same in
    fp32 and bf16. Quantized weights and newly initialized parts are left out.
    """
    hashes: dict[str, list[bytes]] = {}
    for name, weight in model.named_parameters():
        part = part_of(name)
        if weight.is_floating_point() and part not in getattr(model, "newly_initialized", ()):
            found = hashlib.sha256(f"{list(getattr(weight, 'ds_shape', weight.shape))}".encode())
            if (getattr(weight, "ds_numel", None) or weight.numel()) >= HASHED_FROM:
                held = getattr(weight, "ds_tensor", weight).detach().flatten()[:HASHED_VALUES]
                found.update(held.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
            hashes.setdefault(part, []).append(found.digest())
    # Sorted, since the order and names of weights differ between releases of transformers.
    return {part: hashlib.sha256(b"".join(sorted(found))).hexdigest()[:16] for part, found in sorted(hashes.items())}


def check_base(model: Any, trained_on: dict[str, str], where: str) -> None:
    """Raise UserError, beginning with ``where``, if the base is not the one with the fingerprint ``trained_on``."""
    found = base_fingerprint(model)
    if other := sorted(part for part in {**trained_on, **found} if trained_on.get(part) != found.get(part)):
        raise UserError(
            f"{where}: the weights of the {' and '.join(other)} are not those that it was trained on. Load the same "
            "base and revision."
        )
