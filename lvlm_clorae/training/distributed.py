"""Ranks, the few collectives we call ourselves, and trainable weights gathered from wherever ZeRO keeps them."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import distributed

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.vision import VisionTower

T = TypeVar("T")


def start(timeout_minutes: float = 10.0) -> None:
    """Join the process group; alone, without a launcher, as a group of one.

    Args:
        timeout_minutes: after which a collective that not all ranks have joined is an error
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before a quantised base loads straight to its GPU
    timeout = timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)
    # The group of all ranks that DeepSpeed's engine would form much later, and with torch's half an hour: if a rank
    # died until then, the others would wait for it so long.
    groups._WORLD_GROUP = distributed.new_group(timeout=timeout)


def stop() -> None:
    """Leave the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank()


def world_size() -> int:
    return distributed.get_world_size()


def device() -> torch.device:
    """This rank's device."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator.device_name(int(os.environ.get("LOCAL_RANK", "0"))))


def draw_from(text: str) -> None:
    """Seed this rank's random numbers by a text."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def peak_memory() -> int:
    """The most bytes that any rank has used so far, of its GPU or else of main memory. Collective."""
    own = get_accelerator().max_memory_allocated() if device().type != "cpu" else 0
    own = own or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    most = torch.tensor(own, dtype=torch.long, device=device())
    if world_size() > 1:
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device())))


def gathered(items: list[T]) -> list[T] | None:
    """The items of all ranks, one rank's after another's, on rank 0; None elsewhere."""
    if world_size() == 1:
        return items
    parts: list[list[T]] | None = [[] for _ in range(world_size())] if rank() == 0 else None
    distributed.gather_object(items, parts)
    return None if parts is None else [item for part in parts for item in part]


def on_first_rank(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and give every rank its result; a UserError is raised on every rank."""
    box: list[object] = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except UserError as error:
            box[1] = str(error)
    if world_size() > 1:
        distributed.broadcast_object_list(box, src=0, device=device())
    if box[1] is not None:
        everyones = UserError(str(box[1]))
        everyones.everywhere = True
        raise everyones
    return box[0]  # type: ignore[return-value]


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Where ``settings`` say ZeRO-3, transformers' ``from_pretrained`` keeps of each weight this rank's part alone."""
    if settings.get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(settings)  # transformers refers to it weakly
    yield
    del alive


@contextmanager
def buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Around ``deepspeed.initialize``, which in older releases casts buffers to bf16 with the weights.

    Rotary frequencies would be rounded so far that positions blur; transformers keeps them in fp32 in any case.
    """
    own = {name: buffer for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
    yield
    for name, buffer in own.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer.to(model.get_buffer(name).device))


def keep_towers_whole(model: torch.nn.Module) -> None:
    """Let ZeRO-3 gather a vision tower's weights at its own forward, all together.

    The tower reads one layer through open_clip's ``forward_intermediates``, which is no forward of the modules inside:
    weights that these own directly (class token, positions) would not be gathered by their hooks.
    """
    if any(isinstance(module, VisionTower) for module in model.modules()):
        set_z3_leaf_modules(model, [VisionTower])


@contextmanager
def generating(model: torch.nn.Module) -> Iterator[None]:
    """Around ``generate`` of a model that may be partitioned. Collective.

    Some models of transformers read weights that they own directly outside of any forward (LLaVA-OneVision's
    ``image_newline``), where ZeRO-3 does not gather them: they are gathered here.
    """
    inside = {part for module in model.modules() if isinstance(module, VisionTower) for part in module.modules()}
    owners = [module for module in model.modules() if module not in inside and any(module.children())]
    own = [weight for module in owners for weight in module.parameters(recurse=False) if hasattr(weight, "ds_id")]
    if not own:
        yield
        return
    with deepspeed.zero.GatheredParameters(own):
        yield


def gathered_state(model: torch.nn.Module, trainable_only: bool = True) -> dict[str, torch.Tensor]:
    """The weights whole, on the CPU, whatever the ZeRO stage. Collective; empty on ranks other than 0."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only:
            with deepspeed.zero.GatheredParameters([parameter]):
                if rank() == 0:
                    state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state
