"""Process group, collectives, and support for ZeRO-3's partitioned weights."""

import hashlib
import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import distributed
from torch.distributed import DistNetworkError

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.vision import VisionTower

T = TypeVar("T")
rank: Callable[[], int] = distributed.get_rank
world_size: Callable[[], int] = distributed.get_world_size


def start(timeout: float = 600.0) -> None:
    """Initialize the process group, of one rank without a launcher. Collectives raise after ``timeout`` [s].

    Raises UserError if the port of the launcher is in use.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before a quantized base loads straight to its GPU
    limit = timedelta(seconds=timeout)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=limit, verbose=False)
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"Port {os.environ.get('MASTER_PORT')} is in use, perhaps by another run on this machine. Give another: "
            "deepspeed --master_port PORT train.py ..."
        ) from None
    # DeepSpeed's engine would create this group later, with torch's timeout of 30 minutes for ranks that died.
    groups._WORLD_GROUP = distributed.new_group(timeout=limit)


def stop() -> None:
    """Destroy the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def device() -> torch.device:
    """Return this rank's device."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator.device_name(int(os.environ.get("LOCAL_RANK", "0"))))


def seed_from(text: str) -> None:
    """Seed this rank's random number generators with the hash of a text."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def peak_memory() -> int:
    """Return the peak memory of any rank in bytes, on its GPU or else in main memory. Collective."""
    own = get_accelerator().max_memory_allocated() if device().type != "cpu" else 0
    most = torch.tensor(own or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device=device())
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` over all ranks in place and return them."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Return True if the flag is set on any rank. Collective."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device())))


def gathered(items: list[T]) -> list[T] | None:
    """Gather the items of all ranks, in the order of the ranks, on rank 0; None elsewhere. Collective."""
    if world_size() == 1:
        return items
    parts: list[list[T]] | None = [[] for _ in range(world_size())] if rank() == 0 else None
    distributed.gather_object(items, parts)
    return None if parts is None else [item for part in parts for item in part]


def place_on_machine() -> tuple[int, int]:
    """Return this rank's number among the ranks of its machine, and how many these are. Collective."""
    found = gathered([platform.node()])
    machines = on_first_rank(lambda: found or [])
    same = [number for number, machine in enumerate(machines) if machine == platform.node()]
    return same.index(rank()), len(same)


def on_first_rank(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result, or raise its UserError, on every rank. Collective."""
    outcome: list[object] = [None, None]  # result, error message
    if rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    if world_size() > 1:
        distributed.broadcast_object_list(outcome, src=0, device=device())
    if outcome[1] is not None:
        shared = UserError(str(outcome[1]))
        shared.everywhere = True
        raise shared
    return outcome[0]  # type: ignore[return-value]


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Let ``from_pretrained`` partition weights over ranks if the DeepSpeed ``settings`` say ZeRO-3."""
    if settings.get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    reference = HfDeepSpeedConfig(settings)  # transformers keeps a weak reference
    yield
    del reference


@contextmanager
def buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Keep fp32 buffers (rotary frequencies), which ``deepspeed.initialize`` of older releases casts to bf16."""
    before = {name: buffer for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
    yield
    for name, buffer in before.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer.to(model.get_buffer(name).device))


def keep_towers_whole(model: torch.nn.Module) -> None:
    """Make ZeRO-3 gather all weights of a vision tower at its forward.

    open_clip's ``forward_intermediates`` does not call the forward of the submodules that own the class token.
    """
    if any(isinstance(module, VisionTower) for module in model.modules()):
        set_z3_leaf_modules(model, [VisionTower])


@contextmanager
def generating(model: torch.nn.Module) -> Iterator[None]:
    """Gather weights for ``generate`` that ZeRO-3 does not. Collective.

    These are read outside the forward of the module that owns them, such as LLaVA-OneVision's ``image_newline``.
    """
    inside = {part for module in model.modules() if isinstance(module, VisionTower) for part in module.modules()}
    owners = [module for module in model.modules() if module not in inside and any(module.children())]
    own = [weight for module in owners for weight in module.parameters(recurse=False) if hasattr(weight, "ds_id")]
    with deepspeed.zero.GatheredParameters(own) if own else nullcontext():
        yield


def gathered_state(model: torch.nn.Module, trainable_only: bool = True) -> dict[str, torch.Tensor]:
    """Return whole weights on the CPU, under any ZeRO stage; empty on ranks other than 0. Collective.

    With those that are not trained come the buffers of a checkpoint, such as the statistics of a CNN's batch norms.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only:
            with deepspeed.zero.GatheredParameters([parameter]):
                if rank() == 0:
                    state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if rank() == 0 and not trainable_only:
        saved = model.state_dict().keys()
        state |= {name: buffer.to("cpu", copy=True) for name, buffer in model.named_buffers() if name in saved}
    return state
