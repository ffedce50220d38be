"""What a run's checkpoints belong to: the base as it was loaded, and what of it is trained.

Settings are compared in run_directory.py and the data in the stream's state; here is what neither shows: the same name
may lead to another base, and another release may name or shape what is trained otherwise.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.parts import part_of
from lvlm_clorae.training.trained_state import trained_shapes

SAMPLED, FROM = 8, 8192
"""So many values are looked at of each frozen weight that has ``FROM`` or more: they lie on rank 0 up to 1024 ranks."""


def run_identity(model: nn.Module, precision: str) -> dict[str, Any]:
    """A short sum of each frozen part, and the shape of each trained weight; the same on any number of ranks.

    Only rank 0's is complete under ZeRO-3.
    """
    sums: dict[str, Any] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            total = sums.setdefault(part_of(name), hashlib.sha256())
            total.update(f"{name} {list(getattr(weight, 'ds_shape', weight.shape))}".encode())
            if (getattr(weight, "ds_numel", None) or weight.numel()) >= FROM:
                total.update(_first_values(weight))
    parts = {part: total.hexdigest()[:16] for part, total in sorted(sums.items())}
    return {"precision": precision, "base": parts, "trained": trained_shapes(model)}


def check_identity(before: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises UserError, naming the first difference, where ``now`` is not what was saved."""

    def differs(what: str, saved: object, present: object) -> UserError:
        return UserError(
            f"{where}: was written by a run with another {what}: {saved} then, {present} now. "
            "Go on with what the run began with, or start anew with another --output."
        )

    if before["precision"] != now["precision"]:
        raise differs("precision", before["precision"], now["precision"])
    for name in {**before["trained"], **now["trained"]}:
        saved, present = before["trained"].get(name), now["trained"].get(name)
        if saved != present:
            raise differs(f"adapter ({name})", saved or "not trained", present or "not trained")
    for part in {**before["base"], **now["base"]}:
        saved, present = before["base"].get(part), now["base"].get(part)
        if saved != present:
            raise differs(f"base ({part}, by a sum of its weights)", saved or "none", present or "none")


def _first_values(weight: nn.Parameter) -> bytes:
    held = getattr(weight, "ds_tensor", weight).detach().flatten()[:SAMPLED]  # rank 0's part has the first ones
    return bytes(held.cpu().contiguous().view(torch.uint8).numpy())
