"""What ranks say to each other in one optimizer step: every collective of DeepSpeed 0.19's ZeRO and our own, in bytes.

A formula of shapes and settings (docs/scaling.md), for a step after the first few, in which ZeRO-3 records the order of
modules. The payload of a collective is the whole tensor that is reduced, gathered or scattered; a ring sends of it
(n - 1) / n from each of n ranks, twice that for an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

from lvlm_clorae.analysis.weights import Weight, order_of_uses

RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}
"""A collective -> how often a ring sends its payload's (n - 1) / n."""


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed file decides bytes and memory, by DeepSpeed's names and with its defaults."""

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
        """From the section ``zero_optimization``."""
        found: dict[str, Any] = {"overlap_comm": section.get("stage") == 3}
        for item in fields(cls):
            value = section.get(item.name)
            if item.name.startswith("offload_"):
                found[item.name] = isinstance(value, dict) and value.get("device", "none") != "none"
            elif value is not None:
                found[item.name] = bool(value) if item.type == "bool" else int(value)
        return cls(**found)


@dataclass(frozen=True)
class Setting:
    """A run, as far as it decides what is sent.

    Args:
        ranks: n
        accumulation: micro-steps an optimizer step
        itemsize: bytes of an element of weights, gradients and their reductions: 4, or 2 in bf16
        checkpointing: whether activations are computed anew in backward
        side_terms: numbers that ranks add up for the adapter's own loss: one an adapted layer for C-LoRAE's mutual
            information, one an expert of each for LoRAMoE's balance, 0 for other methods and where beta is 0
    """

    ranks: int
    zero: Zero = field(default_factory=Zero)
    accumulation: int = 1
    itemsize: int = 2
    checkpointing: bool = False
    side_terms: int = 0


@dataclass(frozen=True)
class Collective:
    """All calls of one kind with one purpose in an optimizer step.

    Args:
        purpose: ``gradients``, ``weights`` (gathered around their use), ``updated weights``, ``norm``, ``losses``
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``reduce``
        calls: how many
        payload: bytes of all of them
        overlaps: whether computing can go on meanwhile
    """

    purpose: str
    kind: str
    calls: int
    payload: int
    overlaps: bool = False

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, and receives, on a ring."""
        return RING[self.kind] * (ranks - 1) / ranks * self.payload


def traffic(weights: Sequence[Weight], setting: Setting) -> list[Collective]:
    """The collectives of one optimizer step."""
    if setting.ranks == 1:
        return []
    zero, n, size = setting.zero, setting.ranks, setting.itemsize
    trained = sum(weight.numel for weight in weights if weight.trained)
    found = [_losses(setting)]
    if trained:
        found += _gradients(weights, trained, setting)
    if zero.stage < 3:
        found.append(Collective("updated weights", "all_gather", 1, size * padded(trained, 2 * n)))
    else:
        persistent = [padded(weight.numel, n) for weight in weights if persists(weight, zero)]
        found.append(Collective("updated weights", "all_gather", len(persistent), size * sum(persistent)))
        found.append(_gathered(weights, setting))
    return [one for one in found if one.calls]


def padded(numel: int, multiple: int) -> int:
    """The number, filled up to a multiple."""
    return -(-numel // multiple) * multiple


def persists(weight: Weight, zero: Zero) -> bool:
    """Whether ZeRO-3 leaves it whole on each rank between optimizer steps."""
    return weight.numel <= zero.stage3_param_persistence_threshold


def _losses(setting: Setting) -> Collective:
    """Our own: target tokens, side terms and the five numbers of each micro-step, in fp32 (training/loop.py)."""
    numbers = 1 + setting.side_terms + 5
    calls = 3 if setting.side_terms else 2
    return Collective("losses", "all_reduce", calls * setting.accumulation, 4 * numbers * setting.accumulation)


def _gradients(weights: Sequence[Weight], trained: int, setting: Setting) -> list[Collective]:
    """Reduced in buckets: once a step in ZeRO-1, in every micro-step in ZeRO-2 and 3; and their norm."""
    zero, n = setting.zero, setting.ranks
    times = setting.accumulation if zero.stage >= 2 else 1
    kind, elements = "all_reduce", trained
    if zero.stage == 3 and zero.reduce_scatter:
        kind = "reduce_scatter"
        elements = sum(padded(weight.numel, n) for weight in weights if weight.trained)
    elif zero.stage < 3 and zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce:
        kind = "reduce"
    buckets = -(-trained // zero.reduce_bucket_size)
    if kind == "reduce":
        buckets = max(buckets, n)  # one for each owner in each bucket
    reduced = Collective("gradients", kind, buckets * times, times * setting.itemsize * elements, overlaps=True)
    # fp64 in ZeRO-3, fp32 else; ZeRO-1 and 2 ask for infinities by a byte of its own where they compute in bf16
    asked = setting.itemsize == 2 and zero.stage < 3
    norm = Collective("norm", "all_reduce", 1 + asked, (8 if zero.stage == 3 else 4) + asked)
    return [reduced, norm]


def _gathered(weights: Sequence[Weight], setting: Setting) -> Collective:
    """ZeRO-3: each weight that does not persist, around each of its uses unless it is kept from the one before."""
    zero, n = setting.zero, setting.ranks
    uses = order_of_uses(weights, setting.checkpointing)
    passed = _running(weights[use.weight].numel for use in uses)
    held = _running(0 if persists(weights[use.weight], zero) else weights[use.weight].numel for use in uses)
    before: dict[int, int] = {}
    elements, tower, calls, module = 0, 0, 0, ""
    for number, use in enumerate(uses):
        weight, last = weights[use.weight], before.get(use.weight)
        before[use.weight] = number
        if persists(weight, zero):
            continue
        if last is not None and _kept(zero, passed, held, last, number, uses[last].turn):
            continue
        elements += padded(weight.numel, n)
        calls += weight.module != module
        module = weight.module
        if weight.stack == "tower":
            tower += padded(weight.numel, n)
    elements *= setting.accumulation
    calls *= setting.accumulation
    if _tower_stays(weights, zero):
        elements -= (setting.accumulation - 1) * tower
    if zero.stage3_prefetch_bucket_size:
        calls = min(calls, -(-elements // zero.stage3_prefetch_bucket_size))
    return Collective("weights", "all_gather", calls, setting.itemsize * elements, overlaps=True)


def _tower_stays(weights: Sequence[Weight], zero: Zero) -> bool:
    """Whether a tower, gathered as a whole, stays from one micro-step to the next.

    For what is gathered as a whole DeepSpeed looks for the next use inside of later modules too, the model itself among
    them, and counts a weight against the reuse distance once for each module that it lies in.
    """
    counted = sum(weight.numel * weight.name.count(".") for weight in weights if weight.stack != "unused")
    return counted < zero.stage3_max_reuse_distance


def _kept(zero: Zero, passed: list[int], held: list[int], last: int, number: int, turn: int) -> bool:
    """Whether a weight used at ``last`` stays until ``number``.

    It does where fewer elements than the reuse distance are used in between. And the prefetcher, which runs ahead until
    ``max_live_parameters`` elements are there, does not let go of what it meets on its way.
    """
    if passed[number] - passed[last + 1] < zero.stage3_max_reuse_distance:
        return True
    live = held[min(number, turn)] - held[last]
    return zero.stage3_prefetch_bucket_size > 0 and live < zero.stage3_max_live_parameters


def _running(sizes: Iterable[int]) -> list[int]:
    """Sums of what is before each place."""
    return list(accumulate(sizes, initial=0))


def sent(found: Sequence[Collective], ranks: int) -> float:
    """Bytes that each rank sends, and receives, in all."""
    return sum(one.sent(ranks) for one in found)
