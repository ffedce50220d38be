"""How many parameters a base has, which of them are trained, and what they weigh; nothing is read or computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.models.parts import PartSize, part_sizes
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import CHOICES, TrainConfig

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30


def count_parameters(config: TrainConfig, tasks: Sequence[str]) -> dict[str, PartSize]:
    """The sizes of the parts of the base with what ``config.adapter`` trains.

    Bytes are those of the compute type, for a base that is not quantised; ``precision`` auto counts as bf16.

    Raises:
        UserError: as :func:`describe`.
    """
    return part_sizes(describe(config, tasks))


def describe(config: TrainConfig, tasks: Sequence[str]) -> Any:
    """The base with what ``config.adapter`` trains, on the meta device.

    Raises:
        UserError: as :func:`describe_model` and :func:`add_adapter`.
    """
    model = describe_model(config.model, **{name: getattr(config, name) for name in CHOICES})
    model = model.to(torch.float32 if config.precision == "fp32" else torch.bfloat16)
    with torch.device("meta"):
        return add_adapter(model, config, list(tasks))


def render(sizes: dict[str, PartSize], title: str) -> Table:
    """A table of the parts and their sum."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("part", "parameters", "trained", "GiB"):
        table.add_column(column, justify="left" if column == "part" else "right")
    whole = sum(sizes.values(), PartSize())
    for part, size in {**sizes, "all": whole}.items():
        table.add_row(part, f"{size.parameters:,}", f"{size.trained:,}", f"{size.bytes / GIB:.2f}")
    return table
