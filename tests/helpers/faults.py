"""Faults that a rank of the fork server starts with."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

STEP = 4


def on_rank_1_at_step(work: Callable[[Any], None]) -> None:
    """Call ``work`` on rank 1 before micro-step ``STEP``."""
    from lvlm_clorae.training import loop

    original, calls = loop.micro_step, 0

    def faulty(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == "1" and calls == STEP:
            work(arguments[0])
        return original(*arguments, **settings)

    loop.micro_step = faulty


def raise_exception() -> None:
    def work(run: Any) -> None:
        raise ValueError("the injected fault")

    on_rank_1_at_step(work)


def hang() -> None:
    on_rank_1_at_step(lambda run: os.kill(os.getpid(), signal.SIGSTOP))


def die_before_engine() -> None:
    """Kill rank 1 after the rendezvous, while the other rank creates an engine of both."""
    import deepspeed

    original = deepspeed.initialize

    def faulty(*arguments: Any, **settings: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1)
        return original(*arguments, **settings)

    deepspeed.initialize = faulty


def nan_loss() -> None:
    """Make an activation of rank 1 NaN in one micro-step."""

    def work(run: Any) -> None:
        def make_nan(module: Any, inputs: Any, output: Any) -> Any:
            handle.remove()
            return output * float("nan")

        handle = run.model.get_submodule("base_model.model.lm_head").register_forward_hook(make_nan)

    on_rank_1_at_step(work)


def full_disk() -> None:
    """Limit the size of files to a tenth of a checkpoint."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def stop_request_in_measurement() -> None:
    """Ask rank 1 to stop in the measurement of step 4, after the first dataset task."""
    from lvlm_clorae.training import gradients

    original = gradients.probe_batches

    def interrupted(run: Any, dataset_task: Any, step: int) -> Any:
        if os.environ["RANK"] == "1" and step == STEP:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(run, dataset_task, step)

    gradients.probe_batches = interrupted
