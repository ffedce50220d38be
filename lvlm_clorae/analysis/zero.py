"""Memory of a rank under DeepSpeed's ZeRO, from shapes and settings (docs/scaling.md).

The formulas describe DeepSpeed 0.19. Two real ranks confirm them (tests/distributed/test_scaling.py). Not counted are
activations, temporaries of the optimizer and fragmentation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.parts import TOWERS, is_original
from lvlm_clorae.models.quantization import NOT_QUANTIZED
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.deepspeed_config import find_deepspeed_file, read_deepspeed_file, resolve

FP32 = 4
# Settings of the files in ds_configs/
SHIPPED: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000}
# Names inside a block of a language model, which gradient checkpointing recomputes as a whole
BLOCK = re.compile(r".*?\.(?:block|layers|h)\.\d+(?=\.)")


@dataclass(frozen=True)
class Weight:
    """One parameter of a model."""

    name: str
    numel: int
    bytes: int  # stored size, with quantization constants
    trained: bool
    stack: str  # tower, projector, embedding, encoder, decoder (also of a causal model) or unused

    @property
    def module(self) -> str:
        """The module for which ZeRO-3 gathers it; a tower is gathered as a whole."""
        return self.stack if self.stack == "tower" else self.name.rpartition(".")[0]

    @property
    def block(self) -> str:
        """The block that contains it; empty outside of the blocks."""
        found = BLOCK.match(self.name) if self.stack in ("encoder", "decoder") else None
        return found[0] if found else ""


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed file that decide bytes and memory, with DeepSpeed's names and defaults."""

    stage: int = 1
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    reduce_scatter: bool = True
    use_multi_rank_bucket_allreduce: bool = True
    contiguous_gradients: bool = True
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_param: bool = False

    @classmethod
    def read(cls, section: dict[str, Any]) -> Zero:
        """Read the section ``zero_optimization``. Raises UserError."""
        found: dict[str, Any] = {"overlap_comm": section.get("stage") == 3}
        for item in fields(cls):
            value = section.get(item.name)
            if item.name.startswith("offload_"):
                found[item.name] = isinstance(value, dict) and value.get("device", "none") != "none"
            elif value is not None:
                found[item.name] = bool(value) if item.type == "bool" else _integer(item.name, value)
        return cls(**found)

    def keeps_whole(self, weight: Weight) -> bool:
        """Return whether ZeRO-3 keeps a weight whole on each rank between optimizer steps."""
        return weight.numel <= self.stage3_param_persistence_threshold


def _integer(name: str, value: Any) -> int:
    try:
        return int(float(value))  # DeepSpeed reads "5e7" too
    except (TypeError, ValueError, OverflowError):
        raise UserError(f'"zero_optimization.{name}" is {str(value)[:60]}, no number. Correct it.') from None


@dataclass(frozen=True)
class Setting:
    """The part of a run's settings that decides memory."""

    ranks: int
    zero: Zero = field(default_factory=Zero)
    itemsize: int = 2  # bytes of an element of weights, gradients and their reductions: 4 for fp32, 2 for bf16
    checkpointing: bool = False  # activations are recomputed in backward

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, ZeRO-{self.zero.stage}"


def choose_zero(config: TrainConfig, ranks: int | None, stage: int | None, file: str | None) -> Zero:
    """Choose the ZeRO settings of a command line: those of its DeepSpeed file, else the shipped ones of a stage.

    Raises:
        UserError: the file is invalid, the number of ranks is missing, stage and file contradict each other, or a
            quantized base is combined with ZeRO-3
    """
    if ranks is None:
        if stage is not None or file is not None:
            raise UserError("--zero_stage and --deepspeed need the number of ranks. Add --world_size.")
        return Zero()
    section: dict[str, Any] = {"stage": stage or 2, **SHIPPED}
    if file is not None:
        content = read_deepspeed_file(find_deepspeed_file(file))
        section = resolve(content, config, ranks, config.bf16 is not False, file)["zero_optimization"]
        if stage not in (None, section["stage"]):
            raise UserError(f"{file} sets ZeRO-{section['stage']}, but --zero_stage {stage} is given. Remove one.")
    if section["stage"] == 3 and (config.load_in_8bit or config.load_in_4bit):
        raise UserError("ZeRO-3 does not support a quantized base. Use --zero_stage 2 (docs/models.md).")
    return Zero.read(section)


def list_weights(model: Any, itemsize: int, bits: int = 16) -> list[Weight]:
    """List the weights of an adapted model, which may be on the meta device, in the order of registration.

    Args:
        itemsize: bytes of an element that is not quantized
        bits: 8 or 4 if the linear layers of the frozen language model are quantized (docs/models.md)
    """
    embedding = model.get_input_embeddings().weight
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    found = []
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.")
        stack = "embedding" if parameter is embedding else _stack(plain)
        quantized = bits < 16 and id(parameter) in linear and not parameter.requires_grad
        quantized &= stack in ("encoder", "decoder") and not re.match(NOT_QUANTIZED, plain) and ".wo." not in plain
        stored = _quantized_bytes(parameter, bits) if quantized else itemsize * parameter.numel()
        found.append(Weight(name, parameter.numel(), stored, parameter.requires_grad, stack))
    return found


def _stack(name: str) -> str:
    if is_original(name):
        return "unused"
    if re.fullmatch(TOWERS, name):
        return "tower"
    if re.search(r"(projector|connector|merger|fusion)\.", name):
        return "projector"
    return "encoder" if re.match(r"(?:.*\.)?encoder\.", name) else "decoder"


def _quantized_bytes(parameter: nn.Parameter, bits: int) -> int:
    """LLM.int8 has an fp32 scale for each row, nf4 one for 64 elements."""
    scales = parameter.shape[0] if bits == 8 else -(-parameter.numel() // 64)
    return parameter.numel() * bits // 8 + 4 * scales


def padded(numel: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-numel // multiple) * multiple


def memory(weights: Sequence[Weight], setting: Setting) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes of a rank by type, on its GPU and on its host. Types without bytes are left out."""
    zero, n, size = setting.zero, setting.ranks, setting.itemsize
    trained = sum(weight.numel for weight in weights if weight.trained)
    frozen = [weight for weight in weights if not weight.trained]
    if zero.stage == 3:
        part = sum(padded(weight.numel, n) // n for weight in weights if weight.trained)
        found = {
            "frozen weights": sum(padded(w.numel, n) // n * (w.bytes // w.numel) for w in frozen),
            "trained weights": size * part,
            "weights kept whole": size * sum(weight.numel for weight in weights if zero.keeps_whole(weight)),
            "weights gathered": size * _live(weights, setting),
        }
    else:
        whole = padded(trained, 2 * n)
        part, found = whole // n, {"frozen weights": sum(w.bytes for w in frozen), "trained weights": size * whole}
    found["gradients"] = size * (part if zero.stage >= 2 else trained)
    if zero.contiguous_gradients or zero.offload_optimizer:  # allocated whole, however few the gradients
        found["buckets"] = size * zero.reduce_bucket_size * (2 if zero.overlap_comm and zero.stage < 3 else 1)
    found["fp32 gradients"] = found["master weights"] = FP32 * part
    found["moments"] = 2 * FP32 * part

    offloaded = set()
    if zero.offload_optimizer:
        offloaded |= {"fp32 gradients", "master weights", "moments"} | ({"gradients"} if zero.stage >= 2 else set())
    if zero.stage == 3 and zero.offload_param:
        offloaded |= {"frozen weights", "trained weights"}
    gpu = {name: number for name, number in found.items() if number and name not in offloaded}
    return gpu, {name: number for name, number in found.items() if number and name in offloaded}


def _live(weights: Sequence[Weight], setting: Setting) -> int:
    """Elements that are gathered at a time, at most, besides those that are kept whole.

    The prefetcher fills ``max_live_parameters``; the reuse distance alone keeps half of itself on each side of the turn
    from forward to backward; and a module, with checkpointing a block, is whole while it is used.
    """
    zero = setting.zero
    together: Counter[str] = Counter()
    for weight in weights:
        if weight.stack != "unused" and not zero.keeps_whole(weight):
            together[(setting.checkpointing and weight.block) or weight.module] += weight.numel
    ahead = zero.stage3_max_live_parameters if zero.stage3_prefetch_bucket_size else 0
    bound = max(ahead, zero.stage3_max_reuse_distance // 2, max(together.values(), default=0))
    return min(together.total(), bound) if setting.ranks > 1 else 0
