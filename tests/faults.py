"""Faults that a rank of the fork server is born with."""

from __future__ import annotations

import os
import resource
import signal
import time
from typing import Any

STEP = 4


def on_rank_1_at_step(work: Any) -> None:
    """Let ``work`` take rank 1's place in a micro-step: of its losses it gets, and gives, what the loop would see."""
    from lvlm_clorae.training import loop

    original, calls = loop.micro_step, 0

    def faulty(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == "1" and calls == STEP:
            work(arguments[0])
        return original(*arguments, **settings)

    loop.micro_step = faulty


def an_exception() -> None:
    def work(job: Any) -> None:
        raise ValueError("the fault that this test causes")

    on_rank_1_at_step(work)


def a_hang() -> None:
    on_rank_1_at_step(lambda job: os.kill(os.getpid(), signal.SIGSTOP))


def a_death_before_the_engine() -> None:
    """Of rank 1, once the ranks have met: the other then builds an engine that spans both."""
    import deepspeed

    original = deepspeed.initialize

    def faulty(*arguments: Any, **settings: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1)
        return original(*arguments, **settings)

    deepspeed.initialize = faulty


def a_loss_that_is_nan() -> None:
    """For one micro-step, by an activation that is nan on one rank alone."""

    def work(job: Any) -> None:
        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            handle.remove()
            return output * float("nan")

        handle = job.model.get_submodule("base_model.model.lm_head").register_forward_hook(spoil)

    on_rank_1_at_step(work)


def a_full_disk() -> None:
    """No file may be larger than a tenth of a checkpoint."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def told_to_stop_in_a_measurement() -> None:
    """Of step 4, after the first unit, and rank 1 alone."""
    from lvlm_clorae.training import conflicts

    original = conflicts.probe_batches

    def told(job: Any, unit: Any, step: int) -> Any:
        if os.environ["RANK"] == "1" and step == STEP:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(job, unit, step)

    conflicts.probe_batches = told
