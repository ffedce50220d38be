"""Count the collectives and memory of optimizer steps on two ranks, for each case.

Counts the payload of every call of torch.distributed and the bytes of the engine's tensors, and writes them to a JSON
file with one entry a case.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist

from lvlm_clorae.training import distributed
from lvlm_clorae.training.checks import check_run
from lvlm_clorae.training.config_loading import make_config
from lvlm_clorae.training.loop import micro_step
from lvlm_clorae.training.run_directory import Status
from lvlm_clorae.training.setup import Run, build

# Collective -> position of the argument that has the size of the payload.
COLLECTIVES = {
    "all_reduce": 0,
    "broadcast": 0,
    "reduce": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "all_gather": 0,
    "reduce_scatter": 1,
    "gather": 0,
    "scatter": 0,
    "all_to_all": 0,
    "all_to_all_single": 0,
    "send": 0,
    "isend": 0,
    "all_gather_object": None,
    "broadcast_object_list": None,
    "gather_object": None,
    "all_gather_coalesced": 0,
    "all_reduce_coalesced": 0,
    "barrier": None,
}
WARM_UP = 3
"""Micro-steps until ZeRO-3 has recorded the order of modules."""


class Counted:
    """Count calls and payload bytes by collective; ``look`` is called at each of them."""

    def __init__(self) -> None:
        self.look: Callable[[], None] | None = None
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        for name, place in COLLECTIVES.items():
            setattr(dist, name, self._counting(name, place, getattr(dist, name)))

    def _counting(self, name: str, place: int | None, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.look:
                self.look()
                self.calls[name] += 1
                if place is not None:
                    payload = [*args, *kwargs.values()][place]
                    tensors = payload if isinstance(payload, list) else [payload]
                    self.bytes[name] += sum(tensor.nbytes for tensor in tensors)
            return function(*args, **kwargs)

        return call

    @contextmanager
    def counting(self, look: Callable[[], None]) -> Iterator[None]:
        self.calls.clear()
        self.bytes.clear()
        self.look = look
        yield
        self.look = None


class Kept:
    """Bytes of what an engine keeps, at most, by the types of ``lvlm_clorae.analysis.zero.memory``."""

    def __init__(self, run: Run) -> None:
        self.model, self.zero = run.model, run.engine.optimizer
        self.bytes: Counter[str] = Counter()
        basic = getattr(self.zero, "optimizer", self.zero)
        basic.register_step_pre_hook(lambda *_: self.at_step(basic))

    def note(self, kind: str, tensors: Iterable[Any]) -> None:
        found = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if torch.is_tensor(tensor)}
        self.bytes[kind] = max(self.bytes[kind], sum(found.values()))

    def at_call(self) -> None:
        parameters = list(self.model.parameters())
        for kind, trained in (("frozen weights", False), ("trained weights", True)):
            own = [weight for weight in parameters if weight.requires_grad is trained]
            self.note(kind, [getattr(weight, "ds_tensor", weight.data) for weight in own])
        if hasattr(parameters[0], "ds_tensor"):
            self.note("weights kept whole", [weight.data for weight in parameters if weight.ds_persist])
            self.note("weights gathered", [weight.data for weight in parameters if not weight.ds_persist])
        buckets = getattr(self.zero, "ipg_buckets", {}).values()
        buffers = [bucket.buffer for bucket in buckets]
        self.note("buckets", [one for found in buffers for one in (found if isinstance(found, list) else [found])])

    def at_step(self, basic: torch.optim.Optimizer) -> None:
        """Called before the optimizer's step, of which ZeRO-3 may do several."""
        masters = [weight for group in basic.param_groups for weight in group["params"]]
        self.note("master weights", masters)
        self.note("fp32 gradients", [weight.grad for weight in masters])

    def at_end(self) -> dict[str, int]:
        basic = getattr(self.zero, "optimizer", self.zero)
        states = [state for found in basic.state.values() for name, state in found.items() if name != "step"]
        self.note("moments", states)
        self.note("gradients", [getattr(self.zero, "grad_partitions_flat_buffer", None)])
        return dict(self.bytes)


def plain(stage: int, **zero: Any) -> dict[str, Any]:
    own = {"stage3_param_persistence_threshold": 10_000} if stage == 3 else {}
    return {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 50_000, **own, **zero}


RUN = {"per_device_train_batch_size": 2, "max_source_length": 64, "target_modules": ["q", "v"]}
BARE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
# name -> settings of the run, section zero_optimization of its DeepSpeed file
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero 1": ({}, plain(1)),
    "zero 1, accumulating": ({"gradient_accumulation_steps": 3}, plain(1)),
    "zero 1, bf16": ({"bf16": True}, plain(1)),
    "zero 2, accumulating": ({"gradient_accumulation_steps": 3}, plain(2)),
    "zero 2, bf16, overlapped": ({"bf16": True}, plain(2, overlap_comm=True)),
    "zero 2, to owners": ({}, plain(2, use_multi_rank_bucket_allreduce=False)),
    "zero 2, loramoe": ({"adapter": "loramoe"}, plain(2)),
    "zero 3, accumulating": ({"gradient_accumulation_steps": 3}, plain(3)),
    "zero 3, bf16": ({"bf16": True}, plain(3)),
    "zero 3, nothing kept": ({}, plain(3, **BARE)),
    "zero 3, some kept": ({}, plain(3, **{**BARE, "stage3_max_reuse_distance": 1_000_000})),
    "zero 3, few live": (
        {},
        plain(3, **{**BARE, "stage3_prefetch_bucket_size": 50_000, "stage3_max_live_parameters": 600_000}),
    ),
    "zero 3, checkpointing": ({"gradient_checkpointing": True}, plain(3, **BARE)),
    "zero 2, full": ({"adapter": "full"}, plain(2)),
}


def build_run(case: str, shards: Path, folder: Path) -> Run:
    settings, zero = CASES[case]
    file = folder / "deepspeed.json"
    if dist.get_rank() == 0:
        content = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
        file.write_text(json.dumps(content), encoding="utf-8")
    dist.barrier()
    paths = {"shards": str(shards), "deepspeed": str(file), "output_dir": str(folder / "run")}
    config = make_config({**RUN, **paths, **settings})
    dataset, content = check_run(config)
    silent: Any = SimpleNamespace()
    return build(config, dataset, content, folder, silent, Status(folder, dist.get_rank()))


def measure(case: str, counted: Counted, shards: Path, folder: Path) -> dict[str, Any]:
    run = build_run(case, shards, folder)
    batches = iter(run.train_dataloader(run.train_sampler()))
    window = run.config.gradient_accumulation_steps

    def step() -> None:
        for number in range(1, window + 1):
            micro_step(run, next(batches), 1.0, window, last=number == window)

    for _ in range(-(-WARM_UP // window)):
        step()
    kept = Kept(run)
    with counted.counting(kept.at_call):
        step()
    return {"calls": dict(counted.calls), "bytes": dict(counted.bytes), "kept": kept.at_end()}


def main() -> None:
    counted = Counted()  # before DeepSpeed's backend stores the functions
    distributed.start()
    folder = Path(sys.argv[-1])  # with shards/ in it
    results = {case: measure(case, counted, folder / "shards", folder) for case in CASES}
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
