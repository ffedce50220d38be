"""Checkpoints: DeepSpeed's state without frozen weights, our state as JSON, each rank's random state.

    checkpoints/step-00000120/
        state.json                    epoch, micro-step, achievement weights, best score, ranks, ZeRO stage
        rng-rank-0.pt                 torch's random state (read with weights_only)
        mp_rank_00_model_states.pt    DeepSpeed's own files: trainable weights, master weights, moments
        ...

A checkpoint is written under a hidden name and renamed when it is complete, so that a kill at any moment leaves the
previous one; the newest complete one is the one with the highest step.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from lvlm_clorae.errors import UserError
from lvlm_clorae.files import atomic_path, write_text_atomic
from lvlm_clorae.training import distributed

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a run directory, oldest first."""
    found = [path for path in (directory / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(path for path in found if (path / STATE).is_file())


def save(directory: Path, engine: Any, step: int, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint of optimizer step ``step`` and remove all but the newest ``keep``. Collective."""
    parent = directory / "checkpoints"
    name, partial = f"step-{step:08d}", f".step-{step:08d}.partial"
    if (parent / name / STATE).is_file():
        return
    distributed.on_first_rank(lambda: shutil.rmtree(parent / partial, ignore_errors=True))
    engine.save_checkpoint(str(parent), tag=partial, save_latest=False, exclude_frozen_parameters=True)
    with atomic_path(parent / partial / f"rng-rank-{distributed.rank()}.pt") as path:
        torch.save(_random_state(), path)
    distributed.barrier()
    if distributed.rank() == 0:
        layout = {"world_size": distributed.world_size(), "zero_stage": engine.zero_optimization_stage()}
        write_text_atomic(parent / partial / STATE, json.dumps({**state, **layout}))
        (parent / partial).rename(parent / name)
        for old in complete_checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


def load(path: Path, engine: Any) -> dict[str, Any]:
    """Restore what :func:`save` wrote; returns its state. Collective.

    Raises:
        UserError: the checkpoint is of another number of ranks or ZeRO stage, or cannot be read.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the checkpoint cannot be read ({error}). Remove it to go on from the one before."
        ) from None
    if state["world_size"] != distributed.world_size():
        raise UserError(
            f"{path}: was written by {state['world_size']} ranks, but there are {distributed.world_size()}. "
            "Resume with the same number of ranks."
        )
    if state["zero_stage"] != engine.zero_optimization_stage():
        raise UserError(
            f"{path}: was written under ZeRO-{state['zero_stage']}, "
            f"but this is ZeRO-{engine.zero_optimization_stage()}. Resume with a DeepSpeed file of the same stage."
        )
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=False)
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed found no state in it. Remove it to go on from the one before.")
    _set_random_state(torch.load(path / f"rng-rank-{distributed.rank()}.pt", weights_only=True))
    return dict(state)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
