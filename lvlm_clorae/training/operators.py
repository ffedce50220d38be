"""DeepSpeed's C++ operators: compiled at the first start on a machine, for minutes in which signals are answered."""

import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from contextlib import suppress
from typing import Any

import deepspeed
import psutil
from deepspeed.accelerator import get_accelerator

from lvlm_clorae.data.storage import run_in_daemon
from lvlm_clorae.training.preemption import Interrupted, stop_requested

NOTICE = 5.0
"""Seconds after which the compilation is announced."""


def load_operators(settings: Mapping[str, Any]) -> None:
    """Load the operators that a run with these DeepSpeed settings uses; DeepSpeed then finds them loaded.

    Raises Interrupted after a signal to stop. No rank is in the process group yet, where others would wait for it.
    """
    names = ["ShareMemCommBuilder"]  # of CPU ranks
    optimizer, zero = settings.get("optimizer", {}), settings.get("zero_optimization", {})
    if optimizer.get("type", "").lower() in ("adam", "adamw") and not optimizer.get("params", {}).get("torch_adam"):
        names.append("CPUAdamBuilder" if zero.get("offload_optimizer") else "FusedAdamBuilder")
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME):
            run_interruptibly(builder.load, f"compiling DeepSpeed's operator {builder.NAME}, once on a machine")


def run_interruptibly(work: Callable[[], object], what: str) -> None:
    """Run ``work`` in a thread. Raises Interrupted after a signal to stop, when the processes it started have ended."""
    others = set(psutil.Process().children(recursive=True))
    future = run_in_daemon(work)
    notice = time.monotonic() + NOTICE
    while not wait([future], 0.2).done and not stop_requested():
        if time.monotonic() > notice and os.environ.get("RANK", "0") == "0":
            print(f"{what} ...", flush=True)
            notice = math.inf
    if not future.done():
        for child in set(psutil.Process().children(recursive=True)) - others:
            with suppress(psutil.NoSuchProcess):
                child.terminate()
        wait([future], 10)  # torch releases its lock
    if stop_requested() and (not future.done() or future.exception()):  # Ctrl-C reaches the compiler as well
        raise Interrupted(f"while {what}, before the run began")
    future.result()
