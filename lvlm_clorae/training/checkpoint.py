"""Checkpoints: what is trained, whole, and where the run stands; nothing frozen, nothing pickled.

    checkpoints/step-00000120/
        state.json                  what the run is, epoch, micro-step, achievement weights, best score
        trained-00001.safetensors   fp32 weights and moments (trained_state.py), about a gibibyte a file
        random.safetensors          each rank's random state

The files do not depend on the number of ranks or the ZeRO stage, so a run may go on with others. A checkpoint is
written under a hidden name and renamed when it is complete, so that a kill at any moment leaves the previous one; the
newest is the one with the highest step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lvlm_clorae.errors import UserError
from lvlm_clorae.files import sync, write_text_atomic
from lvlm_clorae.training import distributed, trained_state
from lvlm_clorae.training.identity import check_identity

STATE, RANDOM = "state.json", "random.safetensors"
VERSION = 3
"""Of the format and of what the settings beside it mean: in version 2 the default alpha was half of today's."""
FILE_BYTES = 1 << 30
"""A file is closed once it holds so much, which bounds what rank 0 has in memory."""
_NAME = re.compile(r"step-(\d{8})")


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a run directory, oldest first."""
    found = [path for path in (directory / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(path for path in found if (path / STATE).is_file())


def save(directory: Path, engine: Any, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint of optimizer step ``step``, from 1, and remove all but the newest ``keep``. Collective.

    Raises:
        UserError: on every rank, where it cannot be written; the earlier ones are left as they are.
    """
    parent = directory / "checkpoints"
    target = parent / f"step-{step:08d}"
    if distributed.on_first_rank(lambda: (target / STATE).is_file()):
        return target
    state = {**state, "version": VERSION, "world_size": distributed.world_size()}
    state["optimizer"] = trained_state.counters(engine)
    random = distributed.gathered([_random_state()])
    writer = _Writer(target)
    writer.attempt(writer.begin)
    for name, tensor in trained_state.gather(engine):
        writer.attempt(lambda: writer.add(name, tensor))  # noqa: B023 - called at once
    writer.attempt(lambda: writer.finish(state, random or []))

    def conclude() -> None:
        if writer.error is not None:
            left = complete_checkpoints(directory)
            raise UserError(
                f"{target}: the checkpoint could not be written ({writer.error.strerror or writer.error}). "
                + (f"The newest complete one is {left[-1].name}. " if left else "There is no earlier one. ")
                + "Make room, then go on with the same command and --resume auto."
            )
        for old in complete_checkpoints(directory)[:-keep]:
            hidden = old.with_name(f".{old.name}.old")  # so that a kill leaves nothing half removed under its name
            old.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    distributed.on_first_rank(conclude)
    return target


def load(path: Path, engine: Any, identity: dict[str, Any]) -> dict[str, Any]:
    """Restore what :func:`save` wrote; returns its state. Collective.

    Args:
        identity: what this run is (identity.py), to be what the checkpoint's run was

    Raises:
        UserError: the checkpoint cannot be read, is of another version, or of a run with another base or adapter.
    """
    state = distributed.on_first_rank(lambda: _read_state(path, identity))  # whose identity is complete
    try:
        _restore(path, engine, state)
    except (OSError, KeyError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    return state


def _read_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        version, before = state.get("version"), state.get("identity")
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from None
    if version != VERSION or not before:
        raise UserError(
            f"{path}: has version {version!r}, but this program reads {VERSION}. Go on with the release that wrote it."
        )
    check_identity(before, identity, str(path))
    return state


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: the checkpoint cannot be read ({error}). Remove it to go on from the one before.")


def _restore(path: Path, engine: Any, state: dict[str, Any]) -> None:
    files = [safe_open(file, framework="pt") for file in sorted(path.glob("trained-*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
    trained_state.restore(engine, lambda name: where[name].get_tensor(name), state["optimizer"])
    random, rank = load_file(path / RANDOM), distributed.rank()
    if f"{rank}.cpu" in random:
        torch.set_rng_state(random[f"{rank}.cpu"])
        if f"{rank}.cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random[f"{rank}.cuda"])
    else:  # there were fewer ranks
        distributed.draw_from(f"{torch.initial_seed()}/{state['optimizer']}")


class _Writer:
    """Rank 0's files, written while all ranks gather. An OSError is kept for later, so that the gathering goes on."""

    def __init__(self, target: Path) -> None:
        self.target, self.partial = target, target.with_name(f".{target.name}.partial")
        self.error: OSError | None = None
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = self._files = 0

    def attempt(self, work: Callable[[], None]) -> None:
        """Run ``work`` on rank 0, unless something failed before."""
        if distributed.rank() != 0 or self.error is not None:
            return
        try:
            work()
        except (OSError, SafetensorError) as error:
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            self._pending.clear()
            shutil.rmtree(self.partial, ignore_errors=True)

    def begin(self) -> None:
        for left in self.target.parent.glob(".step-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= FILE_BYTES:
            self._flush()

    def finish(self, state: dict[str, Any], random: list[dict[str, torch.Tensor]]) -> None:
        self._flush()
        self._write(RANDOM, {f"{rank}.{name}": value for rank, own in enumerate(random) for name, value in own.items()})
        write_text_atomic(self.partial / STATE, json.dumps(state))
        self.partial.rename(self.target)
        sync(self.target.parent)

    def _flush(self) -> None:
        if self._pending:
            self._files += 1
            self._write(f"trained-{self._files:05d}.safetensors", self._pending)
            self._pending, self._bytes = {}, 0

    def _write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.partial / name)
        sync(self.partial / name)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
