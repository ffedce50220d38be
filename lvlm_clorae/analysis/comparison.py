"""``lvlm-clorae cost --adapter all``: every system and ablation on one base, beside the paper's Table 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lvlm_clorae.analysis.flops import Base, Cost
from lvlm_clorae.analysis.parameters import GIB
from lvlm_clorae.training.config import TrainConfig

if TYPE_CHECKING:
    from rich.table import Table

ADAM = 12
"""Bytes of a trained parameter beside its gradient: an fp32 master weight and Adam's two fp32 moments."""


class Published(NamedTuple):
    """A row of the paper's Table 5."""

    trained: float
    """Millions of parameters."""
    forward: float
    """GFLOPs, of what input the paper does not say."""


PAPER = {
    ("flan-t5-base", 128): {
        "full": Published(287.0, 21.3),
        "LoRA": Published(15.5, 22.0),
        "MoSLoRA": Published(15.8, 26.3),
        "LoRAMoE": Published(30.5, 22.7),
        "C-LoRAE": Published(30.4, 23.2),
    },
    ("flan-t5-large", 64): {
        "full": Published(843.0, 73.2),
        "LoRA": Published(20.3, 74.1),
        "MoSLoRA": Published(20.4, 89.1),
        "LoRAMoE": Published(40.0, 75.2),
        "C-LoRAE": Published(39.9, 75.7),
    },
}
"""Table 5 of arXiv 2505.06303, by base and rank; its full fine-tuning is UMIE's."""


def systems(config: TrainConfig) -> dict[str, TrainConfig]:
    """The systems of the paper's Table 5 and the ablations of its Table 3, with the run's other settings."""
    beta = config.beta or TrainConfig.beta
    clorae = replace(config, adapter="clorae", use_universal=True, use_experts=True, use_gate=True, beta=beta)
    return {
        "full": replace(config, adapter="full"),
        "LoRA": replace(config, adapter="lora"),
        "MoSLoRA": replace(config, adapter="moslora"),
        "LoRAMoE": replace(config, adapter="loramoe", beta=beta),
        "C-LoRAE": clorae,
        "only universal": replace(clorae, use_experts=False),
        "only task experts": replace(clorae, use_universal=False),
        "no gate": replace(clorae, use_gate=False),
        "no MIM": replace(clorae, beta=0.0),
    }


def compare(config: TrainConfig, tasks: Sequence[str]) -> dict[str, Cost]:
    """The cost of each of :func:`systems` on a full micro-batch. Raises UserError as :class:`Base`."""
    base = Base(config)
    return {name: base.count(system, tasks) for name, system in systems(config).items()}


def figures(costs: dict[str, Cost], config: TrainConfig) -> dict[str, dict[str, Any]]:
    """What is told of each system, by its column; operations are a sample's, the paper's None where it has none.

    ``precision`` auto counts as bf16.
    """
    published, lora = PAPER.get((config.model, config.rank), {}), costs["LoRA"]
    itemsize = 4 if config.precision == "fp32" else 2
    found: dict[str, dict[str, Any]] = {}
    for name, cost in costs.items():
        paper = published.get(name)
        found[name] = {
            "trained": cost.trained,
            "paper_trained_millions": paper.trained if paper else None,
            "forward_flops": cost.forward / config.micro_batch,
            "paper_forward_gflops": paper.forward if paper else None,
            "forward_by_lora": cost.forward / lora.forward,
            "paper_forward_by_lora": paper.forward / published["LoRA"].forward if paper else None,
            "both_flops": cost.both / config.micro_batch,
            "both_by_lora": cost.both / lora.both,
            "gradient_bytes": itemsize * cost.trained,
            "optimizer_bytes": ADAM * cost.trained,
        }
    return found


_CELLS = {
    "trained": ("trained, M", lambda x: f"{x / 1e6:.2f}"),
    "paper_trained_millions": ("paper", lambda x: f"{x:.1f}"),
    "forward_flops": ("forward, GFLOPs", lambda x: f"{x / 1e9:,.1f}"),
    "paper_forward_gflops": ("paper", lambda x: f"{x:.1f}"),
    "forward_by_lora": ("by LoRA's", lambda x: f"{x:.4f}"),
    "paper_forward_by_lora": ("paper", lambda x: f"{x:.3f}"),
    "both_flops": ("and backward, GFLOPs", lambda x: f"{x / 1e9:,.1f}"),
    "both_by_lora": ("by LoRA's", lambda x: f"{x:.4f}"),
    "gradient_bytes": ("gradients, GiB", lambda x: f"{x / GIB:.3f}"),
    "optimizer_bytes": ("optimizer, GiB", lambda x: f"{x / GIB:.3f}"),
}


def cells(found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The figures as a table, its head first; without the paper's columns where it has no row of these."""
    known = [name for name in _CELLS if any(row[name] is not None for row in found.values())]
    rows = [("system", *(_CELLS[name][0] for name in known))]
    for system, row in found.items():
        rows.append((system, *("" if row[name] is None else _CELLS[name][1](row[name]) for name in known)))
    return rows


def render(found: dict[str, dict[str, Any]], config: TrainConfig) -> Table:
    """A table of the figures."""
    from rich.table import Table

    title = (
        f"{config.model}, rank {config.rank}, {config.micro_batch} samples a micro-batch, each of a picture, "
        f"{config.max_length} tokens of text and {config.max_answer_length} of answer"
    )
    table = Table(title=title, title_justify="left")
    head, *rows = cells(found)
    for column in head:
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in rows:
        table.add_row(*row)
    return table
