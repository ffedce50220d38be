"""Cost of a base with its adapter: parameters by part, and memory of a GPU.

Models are built on the meta device, so no weights are read (docs/cost.md).
"""

from collections.abc import Sequence
from typing import Any

import torch

from lvlm_clorae.analysis.tables import Sheet
from lvlm_clorae.analysis.zero import Setting, list_weights
from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.models.parts import PartSize, is_original, part_of, part_sizes
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig

GIB = 2**30


def describe(config: TrainConfig, tasks: Sequence[str]) -> Any:
    """Build the base with its adapter on the meta device; ``bf16`` auto counts as bf16. Raises UserError."""
    model = describe_model(config.model, **config.architecture_options())
    model = model.to(torch.float32 if config.bf16 is False else torch.bfloat16)
    with torch.device("meta"):
        return add_adapter(model, config, list(tasks))


def storage(config: TrainConfig) -> tuple[int, int]:
    """Return bytes of an element and bits of a quantised one, 16 without quantisation, for :func:`list_weights`."""
    return 4 if config.bf16 is False else 2, 8 if config.load_in_8bit else 4 if config.load_in_4bit else 16


def stored_sizes(model: Any, config: TrainConfig) -> dict[str, PartSize]:
    """Return the sizes of the parts, with the bytes in which a run with this dtype or quantisation stores them."""
    found = dict.fromkeys(part_sizes(model), PartSize())
    for weight in list_weights(model, *storage(config)):
        numel = 0 if is_original(weight.name) else weight.numel
        found[part_of(weight.name)] += PartSize(numel, numel * weight.trained, weight.bytes)
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


def render_memory(kept: tuple[dict[str, int], dict[str, int]], setting: Setting) -> Sheet:
    """Render :func:`memory` of a rank for a terminal."""
    gpu, host = kept
    sheet = Sheet(f"a rank without activations, {setting}", ["type", "GPU MiB", "host MiB"])
    sheet.rows = [[name, mib(gpu.get(name, 0)), mib(host.get(name, 0))] for name in {**gpu, **host}]
    sheet.rows.append(["all", mib(sum(gpu.values())), mib(sum(host.values()))])
    return sheet


def mib(number: float) -> str:
    """Format bytes as MiB."""
    return f"{number / 2**20:,.1f}" if number >= 2**20 / 10 or not number else f"{number / 2**20:.4f}"


def _size(number: int) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.2f} MiB"
