"""Memory of a rank and bytes of each collective under DeepSpeed's ZeRO, from shapes and settings (docs/scaling.md).

The formulas describe DeepSpeed 0.19 and a step after the first few, in which ZeRO-3 records the order of modules. Two
real ranks confirm them (tests/distributed/test_scaling.py). Not counted are activations, temporaries of the optimizer
and fragmentation.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from torch import nn

from lvlm_clorae.models.parts import TOWERS
from lvlm_clorae.models.quantization import NOT_QUANTIZED

FP32 = 4
# How many times a ring sends (n - 1) / n of a collective's payload from each of n ranks
RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}
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
    matrix: bool = False  # multiplies tokens, at two FLOPs an element and token

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
        """Read the section ``zero_optimization``."""
        found: dict[str, Any] = {"overlap_comm": section.get("stage") == 3}
        for item in fields(cls):
            value = section.get(item.name)
            if item.name.startswith("offload_"):
                found[item.name] = isinstance(value, dict) and value.get("device", "none") != "none"
            elif value is not None:
                found[item.name] = bool(value) if item.type == "bool" else int(value)
        return cls(**found)

    def keeps_whole(self, weight: Weight) -> bool:
        """Return whether ZeRO-3 keeps a weight whole on each rank between optimizer steps."""
        return weight.numel <= self.stage3_param_persistence_threshold


@dataclass(frozen=True)
class Setting:
    """The part of a run's settings that decides memory and communication."""

    ranks: int
    zero: Zero = field(default_factory=Zero)
    accumulation: int = 1  # micro-steps an optimizer step
    itemsize: int = 2  # bytes of an element of weights, gradients and their reductions: 4 for fp32, 2 for bf16
    checkpointing: bool = False  # activations are recomputed in backward
    aux_terms: int = 0  # numbers that the ranks sum for the adapter's auxiliary loss in a micro-step


@dataclass(frozen=True)
class Collective:
    """All calls of one collective with one purpose in an optimizer step."""

    purpose: str  # gradients, weights (gathered for their use), updated weights, norm or losses
    kind: str  # all_reduce, all_gather, reduce_scatter or reduce
    calls: int
    payload: int  # bytes of the whole tensors, over all calls
    overlaps: bool = False  # computation can continue meanwhile

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, and receives, on a ring."""
        return RING[self.kind] * (ranks - 1) / ranks * self.payload


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
        found.append(Weight(name, parameter.numel(), stored, parameter.requires_grad, stack, parameter.dim() >= 2))
    return found


def _stack(name: str) -> str:
    if "original_module." in name:
        return "unused"  # PEFT keeps the original of a module in modules_to_save
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
    for index in {use.weight for use in order_of_uses(weights, False)}:
        weight = weights[index]
        if not zero.keeps_whole(weight):
            together[(setting.checkpointing and weight.block) or weight.module] += weight.numel
    ahead = zero.stage3_max_live_parameters if zero.stage3_prefetch_bucket_size else 0
    bound = max(ahead, zero.stage3_max_reuse_distance // 2, max(together.values(), default=0))
    return min(together.total(), bound) if setting.ranks > 1 else 0


def traffic(weights: Sequence[Weight], setting: Setting) -> list[Collective]:
    """The collectives of one optimizer step."""
    if setting.ranks == 1:
        return []
    zero, n, size = setting.zero, setting.ranks, setting.itemsize
    trained = sum(weight.numel for weight in weights if weight.trained)
    # ours: target tokens, the auxiliary loss and five numbers in each micro-step, in fp32
    calls, numbers = 3 if setting.aux_terms else 2, 1 + setting.aux_terms + 5
    found = [Collective("losses", "all_reduce", calls * setting.accumulation, FP32 * numbers * setting.accumulation)]
    if trained:
        found += _gradients(weights, trained, setting)
    if zero.stage < 3:
        found.append(Collective("updated weights", "all_gather", 1, size * padded(trained, 2 * n)))
    else:
        whole = [padded(weight.numel, n) for weight in weights if zero.keeps_whole(weight)]
        found.append(Collective("updated weights", "all_gather", len(whole), size * sum(whole)))
        found.append(_gathered(weights, setting))
    return [one for one in found if one.calls]


def sent(found: Sequence[Collective], ranks: int) -> float:
    """Bytes that each rank sends, and receives, in total."""
    return sum(one.sent(ranks) for one in found)


def _gradients(weights: Sequence[Weight], trained: int, setting: Setting) -> list[Collective]:
    """Reductions of gradients, in each step for ZeRO-1 and each micro-step for ZeRO-2 and 3, and of their norm."""
    zero, n = setting.zero, setting.ranks
    times = setting.accumulation if zero.stage >= 2 else 1
    kind, elements, buckets = "all_reduce", trained, -(-trained // zero.reduce_bucket_size)
    if zero.stage == 3 and zero.reduce_scatter:
        kind = "reduce_scatter"
        elements = sum(padded(weight.numel, n) for weight in weights if weight.trained)
    elif zero.stage < 3 and zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce:
        kind, buckets = "reduce", max(buckets, n)  # one for each owner in each bucket
    reduced = Collective("gradients", kind, buckets * times, times * setting.itemsize * elements, overlaps=True)
    # The norm is fp64 in ZeRO-3, else fp32. ZeRO-1 and 2 in bf16 reduce a byte more, which flags infinities.
    flag = setting.itemsize == 2 and zero.stage < 3
    return [reduced, Collective("norm", "all_reduce", 1 + flag, (8 if zero.stage == 3 else FP32) + flag)]


def _gathered(weights: Sequence[Weight], setting: Setting) -> Collective:
    """ZeRO-3's gathering of weights that it does not keep whole, for each use unless the last one has left it there."""
    zero, n, a = setting.zero, setting.ranks, setting.accumulation
    uses = order_of_uses(weights, setting.checkpointing)
    passed = list(accumulate((weights[use.weight].numel for use in uses), initial=0))
    partitioned = (0 if zero.keeps_whole(weights[use.weight]) else weights[use.weight].numel for use in uses)
    held = list(accumulate(partitioned, initial=0))

    def stays(last: int, number: int, turn: int) -> bool:
        """Return whether a weight used at ``last`` is still there at ``number``, near or kept by the prefetcher."""
        if passed[number] - passed[last + 1] < zero.stage3_max_reuse_distance:
            return True
        live = held[min(number, turn)] - held[last]
        return zero.stage3_prefetch_bucket_size > 0 and live < zero.stage3_max_live_parameters

    before: dict[int, int] = {}
    elements, tower, calls, module = 0, 0, 0, ""
    for number, use in enumerate(uses):
        weight, last = weights[use.weight], before.get(use.weight)
        before[use.weight] = number
        if zero.keeps_whole(weight) or (last is not None and stays(last, number, uses[last].turn)):
            continue
        elements += padded(weight.numel, n)
        tower += padded(weight.numel, n) if weight.stack == "tower" else 0
        calls += weight.module != module
        module = weight.module
    # For modules gathered as a whole DeepSpeed looks for the next use inside later modules too, the model itself among
    # them, and counts a weight against the reuse distance once for each module that contains it.
    counted = sum(weight.numel * weight.name.count(".") for weight in weights if weight.stack != "unused")
    elements = a * elements - ((a - 1) * tower if counted < zero.stage3_max_reuse_distance else 0)
    calls *= a
    if zero.stage3_prefetch_bucket_size:
        calls = min(calls, -(-elements // zero.stage3_prefetch_bucket_size))
    return Collective("weights", "all_gather", calls, setting.itemsize * elements, overlaps=True)


class Use(NamedTuple):
    """One time that a micro-step needs a whole weight."""

    weight: int  # index in the list of weights
    turn: int  # index in the list of uses at which backward through this part of the model begins


def order_of_uses(weights: Sequence[Weight], checkpointing: bool) -> list[Use]:
    """The uses of a micro-step in order: forward, then backward through everything that a gradient passes.

    With checkpointing each block is computed forward again before its backward.
    """
    forward = _forward(weights)
    uses = [Use(weight, len(forward)) for weight, _ in forward]
    back = [weight for weight, has_gradient in reversed(forward) if has_gradient]
    if not checkpointing:
        return uses + [Use(weight, len(forward)) for weight in back]
    for name, group in groupby(back, key=lambda index: weights[index].block):
        block = list(group)
        if name:
            turn = len(uses) + len(block)
            uses += [Use(weight, turn) for weight in reversed(block)]
        uses += [Use(weight, len(uses)) for weight in block]
    return uses


def _forward(weights: Sequence[Weight]) -> list[tuple[int, bool]]:
    """Index of each weight in the order of forward, and whether a gradient passes through its module."""
    stacks: dict[str, list[int]] = defaultdict(list)
    for index, weight in enumerate(weights):
        stacks["head" if "lm_head." in weight.name else weight.stack].append(index)
    body = stacks["embedding"] + stacks["tower"] + stacks["projector"] + stacks["encoder"]
    body += (stacks["embedding"] if stacks["encoder"] else []) + stacks["decoder"]  # the decoder looks up ids as well
    found, trained = [], False
    for number, index in enumerate(body + (stacks["head"] or stacks["embedding"])):
        weight = weights[index]
        trained = trained or weight.trained
        looked_up = weight.stack == "embedding" and number < len(body)  # ids have no gradient
        found.append((index, weight.trained or (trained and not looked_up)))
    return found
