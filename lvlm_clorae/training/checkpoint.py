"""Checkpoints: trained weights, optimizer state and progress; no frozen weights and no pickles (docs/training.md).

The files do not depend on the number of ranks or the ZeRO stage. A checkpoint is written under a hidden name and
renamed when it is complete, so a kill at any moment leaves the previous one. The fingerprint detects another base under
the same name and other trained weights; settings are compared in run_directory.py, data in the sampler's state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lvlm_clorae.digests import DIGESTS, check_digests, write_digests
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import parse_json, sync, write_text_atomic
from lvlm_clorae.training import distributed, optimizer_state
from lvlm_clorae.training.run_directory import complete_checkpoints, how_to_resume

STATE, RANDOM = "state.json", "random.safetensors"
VERSION = 7
FILE_BYTES = 1 << 30
"""A file is closed when it reaches this size, which limits the memory of rank 0."""


def save(directory: Path, engine: Any, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of step ``step`` (from 1) and remove all but the newest ``keep``. Collective.

    Raises UserError on every rank, and keeps earlier checkpoints, if it cannot be written.
    """
    target = directory / "checkpoints" / f"step-{step:08d}"
    if distributed.on_first_rank(lambda: (target / STATE).is_file()):
        return target
    state = {**state, "version": VERSION, "world_size": distributed.world_size()}
    state["optimizer"] = optimizer_state.counters(engine)
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    all_random = distributed.gathered([random]) or []
    writer = _Writer(target)
    writer.attempt(writer.begin)
    for name, tensor in optimizer_state.gather(engine):
        writer.attempt(lambda: writer.add(name, tensor))  # noqa: B023 - called immediately
    writer.attempt(lambda: writer.finish(state, all_random))
    distributed.on_first_rank(lambda: _conclude(writer, directory, keep))
    return target


def load(
    paths: Sequence[Path], engine: Any, fingerprint: dict[str, Any], say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """Restore the last of the checkpoints ``paths`` that is not damaged, and return its path and state. Collective.

    ``say`` reports damaged ones on rank 0. Raises UserError if all are damaged, or one is of another run or release.
    """
    path, state = distributed.on_first_rank(lambda: _last_intact(paths, fingerprint, say))
    try:
        _restore(path, engine, state)
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{path}: the checkpoint cannot be read ({error}). Remove it to resume from an earlier one."
        ) from None
    return path, state


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Raise a UserError that names the first difference if the fingerprints are not equal."""

    def compare(name: str, before: object, now: object) -> None:
        if before != now:
            raise UserError(
                f"{where}: was written by a run with another {name}: {before} then, {now} now. "
                "Resume with the original one, or start a new run with another --output_dir."
            )

    if saved["precision"] != current["precision"]:
        raise UserError(
            f"{where}: was written by a run in {saved['precision']}, but this one computes in {current['precision']}. "
            f"Resume with --bf16 {str(saved['precision'] == 'bf16').lower()}."
        )
    for name in {**saved["trained"], **current["trained"]}:
        shapes = (found["trained"].get(name, "not trained") for found in (saved, current))
        compare(f"adapter ({name})", *shapes)
    for part in {**saved["base"], **current["base"]}:
        compare(f"base ({part}, by a hash of its weights)", *(found["base"].get(part) for found in (saved, current)))


def _last_intact(
    paths: Sequence[Path], fingerprint: dict[str, Any], say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    problems = []
    for path in reversed(paths):
        try:
            return path, _read_state(path, fingerprint)
        except _Damaged as error:
            problems.append(f"{path}: the checkpoint is damaged ({error})")
            say(f"{problems[-1]}; trying an earlier one")
    raise UserError(f"{'; '.join(problems)}. Restore one of them from a copy, or start a new run.")


class _Damaged(Exception):
    """A checkpoint cannot be read or its bytes have changed."""


def _read_state(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = parse_json((path / STATE).read_bytes())
        version, saved = state.get("version"), state.get("fingerprint")
        if version == VERSION or (path / DIGESTS).exists():
            check_digests(path)
    except (OSError, ValueError, AttributeError) as error:
        raise _Damaged(str(error)) from None
    if version != VERSION or not saved:
        raise UserError(
            f"{path}: has version {version!r}, but this release reads version {VERSION}. "
            "Resume the run with the release that wrote it, or start a new run with another --output_dir."
        )
    check_fingerprint(saved, fingerprint, str(path))
    return state


def _restore(path: Path, engine: Any, state: dict[str, Any]) -> None:
    files = [safe_open(file, framework="pt") for file in sorted(path.glob("trained-*.safetensors"))]
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
    optimizer_state.restore(engine, lambda name: file_of[name].get_tensor(name), state["optimizer"])
    random, rank = load_file(path / RANDOM), distributed.rank()
    if f"{rank}.cpu" in random:
        torch.set_rng_state(random[f"{rank}.cpu"])
        if f"{rank}.cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random[f"{rank}.cuda"])
    else:  # the saved run had fewer ranks
        distributed.seed_from(f"{torch.initial_seed()}/{state['optimizer']}")


def _conclude(writer: _Writer, directory: Path, keep: int) -> None:
    """Report a failed write, or remove old checkpoints."""
    complete = complete_checkpoints(directory)
    if writer.error is not None:
        raise UserError(
            f"{writer.target}: the checkpoint could not be written ({writer.error.strerror or writer.error}). "
            f"The newest complete one is {complete[-1].name if complete else 'missing'}. "
            f"Free disk space. {how_to_resume(directory)}"
        )
    for old in complete[:-keep]:
        hidden = old.rename(old.with_name(f".{old.name}.old"))  # a kill leaves no part of it under its name
        shutil.rmtree(hidden, ignore_errors=True)


class _Writer:
    """Writer on rank 0. It keeps the first OSError, so that all ranks can go on gathering weights."""

    def __init__(self, target: Path) -> None:
        self.target, self.partial = target, target.with_name(f".{target.name}.partial")
        self.error: OSError | None = None
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = self._files = 0

    def attempt(self, work: Callable[[], None]) -> None:
        """Run ``work`` on rank 0 unless an earlier call failed."""
        if distributed.rank() != 0 or self.error is not None:
            return
        try:
            work()
        except (OSError, SafetensorError) as error:
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            self._pending.clear()
            shutil.rmtree(self.partial, ignore_errors=True)

    def begin(self) -> None:
        for leftover in self.target.parent.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
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
        write_digests(self.partial)
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
