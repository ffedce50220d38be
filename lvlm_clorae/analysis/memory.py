"""What a rank keeps of model, gradients and optimizer, on its GPU and on its host: bytes, from shapes and settings.

Counted is the peak of each kind (docs/scaling.md says when it is); activations, the optimizer's temporaries and the
allocator's losses are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lvlm_clorae.analysis.traffic import Setting, Zero, padded, persists
from lvlm_clorae.analysis.weights import Weight, order_of_uses

FP32 = 4
KINDS = (
    "frozen weights",
    "trained weights",
    "weights kept whole",
    "weights gathered",
    "gradients",
    "buckets",
    "fp32 gradients",
    "master weights",
    "moments",
)


@dataclass(frozen=True)
class Memory:
    """Bytes by kind (``KINDS``), none where there are none."""

    gpu: dict[str, int]
    host: dict[str, int]

    def total(self) -> tuple[int, int]:
        """Of the GPU and of the host."""
        return sum(self.gpu.values()), sum(self.host.values())


def memory(weights: Sequence[Weight], setting: Setting) -> Memory:
    """What each rank keeps; the last rank's padding counts for all."""
    zero, n, size = setting.zero, setting.ranks, setting.itemsize
    trained = sum(weight.numel for weight in weights if weight.trained)
    if zero.stage == 3:
        part = sum(padded(weight.numel, n) // n for weight in weights if weight.trained)
    else:
        part = padded(trained, 2 * n) // n
    found = dict.fromkeys(KINDS, 0)
    if zero.stage == 3:
        found["frozen weights"] = sum(
            padded(weight.numel, n) // n * (weight.bytes // weight.numel) for weight in weights if not weight.trained
        )
        found["trained weights"] = size * part
        found["weights kept whole"] = size * sum(weight.numel for weight in weights if persists(weight, zero))
        found["weights gathered"] = size * _gathered(weights, setting)
    else:
        found["frozen weights"] = sum(weight.bytes for weight in weights if not weight.trained)
        found["trained weights"] = size * padded(trained, 2 * n)
    found["gradients"] = size * (part if zero.stage >= 2 else trained)
    found["buckets"] = size * _buckets(zero)
    found["fp32 gradients"] = found["master weights"] = FP32 * part
    found["moments"] = 2 * FP32 * part

    away = set()
    if zero.offload_optimizer:
        away |= {"fp32 gradients", "master weights", "moments"} | ({"gradients"} if zero.stage >= 2 else set())
    if zero.stage == 3 and zero.offload_param:
        away |= {"frozen weights", "trained weights"}
    gpu = {kind: number for kind, number in found.items() if number and kind not in away}
    host = {kind: number for kind, number in found.items() if number and kind in away}
    return Memory(gpu, host)


def _gathered(weights: Sequence[Weight], setting: Setting) -> int:
    """Elements that are whole at a time, at most, beside those that persist.

    The prefetcher fills ``max_live_parameters``, to which it may add a weight; the reuse distance alone keeps half of
    itself on each side of the turn from forward to backward; and a module is whole when it is used, with checkpointing
    a block.
    """
    zero = setting.zero
    together: dict[str, int] = {}
    for place in {use.weight for use in order_of_uses(weights, False)}:
        weight = weights[place]
        if not persists(weight, zero):
            name = (setting.checkpointing and weight.block) or weight.module
            together[name] = together.get(name, 0) + weight.numel
    ahead = zero.stage3_max_live_parameters if zero.stage3_prefetch_bucket_size else 0
    bound = max(ahead, zero.stage3_max_reuse_distance // 2, max(together.values(), default=0))
    return min(sum(together.values()), bound) if setting.ranks > 1 else 0


def _buckets(zero: Zero) -> int:
    """Elements of the buffers in which gradients are collected: allocated whole, however few the gradients."""
    if not zero.contiguous_gradients and not zero.offload_optimizer:
        return 0
    return zero.reduce_bucket_size * (2 if zero.overlap_comm and zero.stage < 3 else 1)
