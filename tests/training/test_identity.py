"""What a checkpoint belongs to: each difference is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lvlm_clorae.errors import UserError
from lvlm_clorae.training.identity import FROM, check_identity, run_identity


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.vision_tower, self.projector = nn.Linear(FROM, 1), nn.Linear(FROM, 1), nn.Linear(3, 2)
        self.encoder.requires_grad_(False)
        self.vision_tower.requires_grad_(False)


def identity(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Base()
    for name, change in changes.items():
        change(getattr(model, name))
    return run_identity(model, "fp32")


def test_the_same_is_the_same() -> None:
    check_identity(identity(), identity(), "step-1")
    check_identity(identity(), identity(projector=lambda part: part.weight.data.fill_(3.0)), "step-1")  # is trained


@pytest.mark.parametrize(
    ("part", "named"), [("encoder", r"base \(language model"), ("vision_tower", r"base \(vision tower")]
)
def test_other_frozen_weights(part: str, named: str) -> None:
    with pytest.raises(UserError, match=f"step-1.*{named}.*then.*now"):
        check_identity(identity(), identity(**{part: lambda module: module.weight.data[0, :3].add_(1)}), "step-1")


def test_another_adapter() -> None:
    now = copy.deepcopy(identity())
    now["trained"]["projector.weight"] = [3, 3]
    with pytest.raises(UserError, match=r"another adapter \(projector.weight\): \[2, 3\] then, \[3, 3\] now"):
        check_identity(identity(), now, "step-1")
    with pytest.raises(UserError, match=r"adapter \(encoder.weight\): not trained then"):
        check_identity(identity(), identity(encoder=lambda part: part.requires_grad_(True)), "step-1")


def test_another_precision() -> None:
    with pytest.raises(UserError, match="another precision: fp32 then, bf16 now"):
        check_identity(identity(), {**identity(), "precision": "bf16"}, "step-1")
