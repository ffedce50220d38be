"""Cost of a base with its adapter: parameters by part, and all systems and ablations beside the paper's Table 5.

Models are built on the meta device, so no weights are read (docs/cost.md).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lvlm_clorae.analysis.flops import Base, Cost
from lvlm_clorae.analysis.paper import paper_row
from lvlm_clorae.analysis.scaling import storage
from lvlm_clorae.analysis.tables import Sheet
from lvlm_clorae.analysis.zero import list_weights
from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.models.parts import PartSize, part_of, part_sizes
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig

GIB = 2**30
OPTIMIZER_BYTES = 12  # a trained parameter: an fp32 master weight and Adam's two fp32 moments
_COLUMNS = {
    "trained": ("trained, M", lambda x: f"{x / 1e6:.2f}"),
    "paper_trained_millions": ("paper", lambda x: f"{x:.1f}"),
    "forward_flops": ("forward, GFLOPs", lambda x: f"{x / 1e9:,.1f}"),
    "paper_forward_gflops": ("paper", lambda x: f"{x:.1f}"),
    "forward_by_lora": ("vs LoRA", lambda x: f"{x:.4f}"),
    "paper_forward_by_lora": ("paper", lambda x: f"{x:.3f}"),
    "both_flops": ("forward + backward, GFLOPs", lambda x: f"{x / 1e9:,.1f}"),
    "both_by_lora": ("vs LoRA", lambda x: f"{x:.4f}"),
    "gradient_bytes": ("gradients, GiB", lambda x: f"{x / GIB:.3f}"),
    "optimizer_bytes": ("optimizer, GiB", lambda x: f"{x / GIB:.3f}"),
}


def describe(config: TrainConfig, tasks: Sequence[str]) -> Any:
    """Build the base with its adapter on the meta device; ``bf16`` auto counts as bf16. Raises UserError."""
    model = describe_model(config.model, **config.architecture_options())
    model = model.to(torch.float32 if config.bf16 is False else torch.bfloat16)
    with torch.device("meta"):
        return add_adapter(model, config, list(tasks))


def stored_sizes(model: Any, config: TrainConfig) -> dict[str, PartSize]:
    """Return the sizes of the parts, with the bytes in which a run with this dtype or quantisation stores them."""
    found = dict.fromkeys(part_sizes(model), PartSize())
    for weight in list_weights(model, *storage(config)):
        found[part_of(weight.name)] += PartSize(weight.numel, weight.numel * weight.trained, weight.bytes)
    return found


def render_parameters(sizes: dict[str, PartSize], config: TrainConfig) -> Sheet:
    """Render the parts and their sum for a terminal."""
    size, bits = storage(config)
    dtype = ("bf16" if size == 2 else "fp32") + (f", language model in {bits} bits" if bits < 16 else "")
    rows = [
        [part, f"{size.parameters:,}", f"{size.trained:,}", _size(size.bytes)]
        for part, size in {**sizes, "all": sum(sizes.values(), PartSize())}.items()
    ]
    title = f"{config.model} with {config.adapter}, rank {config.lora_rank}, in {dtype}"
    return Sheet(title, ["part", "parameters", "trained", "size"], rows)


def _size(number: int) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.2f} MiB"


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


def count_systems(config: TrainConfig, tasks: Sequence[str]) -> dict[str, Cost]:
    """Count each of :func:`systems` on a full micro-batch. Raises UserError as :class:`Base`."""
    base = Base(config)
    return {name: base.count(system, tasks) for name, system in systems(config).items()}


def figures(costs: dict[str, Cost], config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Figures of each system, with operations a sample; ``bf16`` auto counts as bf16. None where the paper has none."""
    lora = costs["LoRA"]
    itemsize = 4 if config.bf16 is False else 2
    published = {name: _published(system) for name, system in systems(config).items()}
    samples = config.per_device_train_batch_size
    found: dict[str, dict[str, Any]] = {}
    for name, cost in costs.items():
        trained, forward = published[name]
        found[name] = {
            "trained": cost.trained,
            "paper_trained_millions": trained,
            "forward_flops": cost.forward / samples,
            "paper_forward_gflops": forward,
            "forward_by_lora": cost.forward / lora.forward,
            "paper_forward_by_lora": forward / base if forward and (base := published["LoRA"][1]) else None,
            "both_flops": cost.both / samples,
            "both_by_lora": cost.both / lora.both,
            "gradient_bytes": itemsize * cost.trained,
            "optimizer_bytes": OPTIMIZER_BYTES * cost.trained,
        }
    return found


def _published(system: TrainConfig) -> tuple[float | None, float | None]:
    """Trained parameters and forward operations in the paper, if the rank is the paper's."""
    row = paper_row(system)
    return (row.trained, row.forward) if row and row.settings().lora_rank == system.lora_rank else (None, None)


def cells(found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Format :func:`figures` as a table with its header first, without columns that are empty."""
    known = [name for name in _COLUMNS if any(row[name] is not None for row in found.values())]
    rows = [("system", *(_COLUMNS[name][0] for name in known))]
    for system, row in found.items():
        rows.append((system, *("" if row[name] is None else _COLUMNS[name][1](row[name]) for name in known)))
    return rows


def render_systems(found: dict[str, dict[str, Any]], config: TrainConfig) -> Sheet:
    """Render :func:`figures` for a terminal."""
    title = (
        f"{config.model}, rank {config.lora_rank}, {config.per_device_train_batch_size} samples a micro-batch, each "
        f"with an image, {config.max_source_length} prompt and {config.max_target_length} answer tokens"
    )
    head, *rows = cells(found)
    return Sheet(title, list(head), [list(row) for row in rows])
