"""Bytes of each collective of an optimizer step under DeepSpeed's ZeRO, from shapes and settings (docs/scaling.md).

The formulas describe DeepSpeed 0.19 and a step after the first few, in which ZeRO-3 records the order of modules. Two
real ranks confirm them (tests/distributed/test_scaling.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from lvlm_clorae.analysis.zero import FP32, Setting, Weight, padded

# How many times a ring sends (n - 1) / n of a collective's payload from each of n ranks
RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}


@dataclass(frozen=True)
class Step(Setting):
    """The part of a run's settings that decides memory and communication of an optimizer step."""

    accumulation: int = 1  # micro-steps
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


def traffic(weights: Sequence[Weight], step: Step) -> list[Collective]:
    """The collectives of one optimizer step."""
    if step.ranks == 1:
        return []
    zero, n, size = step.zero, step.ranks, step.itemsize
    trained = sum(weight.numel for weight in weights if weight.trained)
    # ours: target tokens, the auxiliary loss and five numbers in each micro-step, in fp32
    calls, numbers = 3 if step.aux_terms else 2, 1 + step.aux_terms + 5
    found = [Collective("losses", "all_reduce", calls * step.accumulation, FP32 * numbers * step.accumulation)]
    if trained:
        found += _gradients(weights, trained, step)
    if zero.stage < 3:
        found.append(Collective("updated weights", "all_gather", 1, size * padded(trained, 2 * n)))
    else:
        whole = [padded(weight.numel, n) for weight in weights if zero.keeps_whole(weight)]
        found.append(Collective("updated weights", "all_gather", len(whole), size * sum(whole)))
        found.append(_gathered(weights, step))
    return [one for one in found if one.calls]


def sent(found: Sequence[Collective], ranks: int) -> float:
    """Bytes that each rank sends, and receives, in total."""
    return sum(one.sent(ranks) for one in found)


def _gradients(weights: Sequence[Weight], trained: int, step: Step) -> list[Collective]:
    """Reductions of gradients, in each step for ZeRO-1 and each micro-step for ZeRO-2 and 3, and of their norm."""
    zero, n = step.zero, step.ranks
    times = step.accumulation if zero.stage >= 2 else 1
    kind, elements, buckets = "all_reduce", trained, -(-trained // zero.reduce_bucket_size)
    if zero.stage == 3 and zero.reduce_scatter:
        kind = "reduce_scatter"
        elements = sum(padded(weight.numel, n) for weight in weights if weight.trained)
    elif zero.stage < 3 and zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce:
        kind, buckets = "reduce", max(buckets, n)  # one for each owner in each bucket
    reduced = Collective("gradients", kind, buckets * times, times * step.itemsize * elements, overlaps=True)
    # The norm is fp64 in ZeRO-3, else fp32. ZeRO-1 and 2 in bf16 reduce a byte more, which flags infinities.
    flag = step.itemsize == 2 and zero.stage < 3
    return [reduced, Collective("norm", "all_reduce", 1 + flag, (8 if zero.stage == 3 else FP32) + flag)]


def _gathered(weights: Sequence[Weight], step: Step) -> Collective:
    """ZeRO-3's gathering of weights that it does not keep whole, for each use unless the last one has left it there."""
    zero, n, a = step.zero, step.ranks, step.accumulation
    uses = order_of_uses(weights, step.checkpointing)
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
    return Collective("weights", "all_gather", calls, step.itemsize * elements, overlaps=True)


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
