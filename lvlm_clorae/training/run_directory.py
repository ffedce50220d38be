"""The run directory: ownership, ``metrics.jsonl`` and ``status.json``.

    config.yaml  status.json  metrics.jsonl  tensorboard/  checkpoints/  best/  adapter/  predictions/  scores.json

The ``state`` in ``status.json`` is one of ``STATES``; a run that was killed leaves "running" with an old ``time``.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from contextlib import suppress
from datetime import datetime, timezone
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from lvlm_clorae.errors import UserError
from lvlm_clorae.files import file_errors, write_text_atomic
from lvlm_clorae.models.presets import ALIGNED
from lvlm_clorae.training.config import MAY_CHANGE, PROJECTOR, TrainConfig
from lvlm_clorae.training.config_loading import read_config
from lvlm_clorae.training.run_lock import LOCK, lock_run

STATUS = "status.json"
STATES = ("running", "interrupted", "failed", "done")
HEARTBEAT_SECONDS = 20.0


def open_run(config: TrainConfig) -> Path:
    """Create the run directory, or open it to resume, lock it and write ``config.yaml``.

    Raises UserError as :func:`find_run` and :func:`~lvlm_clorae.training.run_lock.lock_run`.
    """
    directory = find_run(config)
    with file_errors(f"{directory}: cannot be written", "Choose another --output_dir."):
        directory.mkdir(parents=True, exist_ok=True)
        lock_run(directory, slurm_job())
        write_text_atomic(directory / "config.yaml", config.to_yaml())
    return directory


def find_run(config: TrainConfig) -> Path:
    """Return the directory of the run. Raises UserError if it holds something else; writes nothing."""
    directory = Path(config.output_dir) if config.output_dir else _default_directory(config)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file, but the run needs a directory. Choose another --output_dir.")
    if config.resume_from_checkpoint not in (None, "auto"):
        _check_checkpoint(Path(config.resume_from_checkpoint), directory)
    if directory.is_dir() and any(path.name != LOCK for path in directory.iterdir()):
        _check_ownership(directory, config)
    return directory


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run directory, oldest first."""
    return sorted(path.parent for path in directory.glob(f"checkpoints/step-{'[0-9]' * 8}/state.json"))


def is_done(config: TrainConfig, directory: Path) -> bool:
    """Return True if the run has ended, its last file is there, and its newest checkpoint is that of its last step."""
    status, newest = read_status(directory / STATUS), complete_checkpoints(directory)[-1:]
    at_end = all(path.name == f"step-{status.get('step')!s:0>8}" for path in newest)
    return status.get("state") == "done" and (directory / last_file(config)).is_file() and at_end


def last_file(config: TrainConfig) -> str:
    """Return the name of the file that a run writes last."""
    return {"none": "scores.json", PROJECTOR: f"{ALIGNED}/config.json"}.get(config.adapter, "adapter/schema.json")


def how_to_resume(directory: Path) -> str:
    """Return the end of a message about a run that has not ended."""
    return f"Resume with the same command and --output_dir {directory} --resume_from_checkpoint auto."


def _check_checkpoint(path: Path, directory: Path) -> None:
    """Raise UserError unless ``path`` is the newest complete checkpoint of the run."""
    complete = complete_checkpoints(directory)
    found = [each.resolve() for each in complete]
    if path.resolve() not in found:
        names = f"Give auto, or one of {', '.join(map(str, complete))}." if complete else "It has none: give auto."
        raise UserError(f"{path}: no complete checkpoint of {directory}. {names}")
    if newer := complete[found.index(path.resolve()) + 1 :]:
        newer += filter(Path.exists, map(directory.joinpath, ("best", "adapter", "predictions", "scores.json")))
        aside, metrics = (shlex.quote(str(directory / name)) for name in (f"after-{path.name}", "metrics.jsonl"))
        raise UserError(
            f"{path}: is not the newest checkpoint. Use auto, or move what came after it aside: "
            f"mkdir {aside} && cp {metrics} {aside} && mv {shlex.join(map(str, newer))} {aside}"
        )


def _default_directory(config: TrainConfig) -> Path:
    if (checkpoint := Path(config.resume_from_checkpoint or "")).parent.name == "checkpoints":
        return checkpoint.parent.parent
    stem = f"{Path(config.model).name}-{config.adapter}"
    paths = (Path("runs") / (f"{stem}-{number}" if number > 1 else stem) for number in count(1))
    used = list(takewhile(Path.exists, paths))
    if used and config.resume_from_checkpoint:
        return next(filter(complete_checkpoints, reversed(used)), used[-1])  # not one that failed at its start
    return Path("runs") / (f"{stem}-{len(used) + 1}" if used else stem)


def _check_ownership(directory: Path, config: TrainConfig) -> None:
    def refused(problem: str, fix: str) -> UserError:
        return UserError(f"{directory}: {problem} {fix}, or choose another --output_dir.")

    path = directory / "config.yaml"
    kept = any((directory / name).exists() for name in ("checkpoints", "best", "adapter", "scores.json"))
    if read_status(directory / STATUS).get("state") == "failed" and not kept:
        return  # a corrected command may use it again
    if not path.is_file():
        raise refused("is not empty and holds no run.", "Empty it")
    try:
        saved = read_config(path)
    except UserError as error:
        problem = f"holds a config.yaml that this release cannot read ({error})"
        raise refused(problem, "Resume with the release that wrote it") from None
    if config.resume_from_checkpoint is None:
        raise refused("already holds a run.", "Resume it with --resume_from_checkpoint auto")
    for name, value in vars(config).items():
        if name not in MAY_CHANGE and getattr(saved, name) != value:
            problem = f"holds a run with {name} = {getattr(saved, name)}, but this one has {value}."
            raise refused(problem, "Resume with the same setting")


class Metrics:
    """Writer of ``metrics.jsonl`` and TensorBoard events; drops records of steps after ``step``, which are repeated."""

    def __init__(self, directory: Path, step: int, active: bool = True) -> None:
        self._active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = directory / "metrics.jsonl"
        # A checkpoint is written before the evaluation of its epoch, which is repeated at a step that is kept.
        self._kept: set[tuple[int, str]] = set()
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            self._kept = {(record["step"], record["kind"]) for record in map(json.loads, kept)}
            write_text_atomic(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed in close()
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Write a record unless there is one of this kind and step; numbers become TensorBoard scalars."""
        if not self._active or (step, kind) in self._kept:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            for key, number in value.items() if isinstance(value, dict) else ((None, value),):
                if isinstance(number, int | float):
                    self._board.add_scalar(f"{kind}/{name}" + (f"/{key}" if key else ""), number, step)

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._board.close()


def _step_of(line: str) -> float:
    try:
        record = json.loads(line)
        return float(record["step"]) if "kind" in record else float("inf")
    except (ValueError, KeyError, TypeError):  # a line truncated by a kill
        return float("inf")


def slurm_job() -> str | None:
    """Return the id of the current SLURM job, ``ARRAY_TASK`` in an array; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def read_status(path: Path) -> dict[str, Any]:
    """Return the content of a ``status.json``; empty if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("state") not in STATES:
        return {}
    message = content.get("message")
    return {**content, "message": message if isinstance(message, str) else None}


class Status:
    """Writer of ``status.json``: rank 0 reports progress, the first rank that fails reports the error."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._path, self._rank = directory / STATUS, rank
        self.progress = {"step": 0, "epoch": 0}
        self._written = 0.0

    def start(self) -> None:
        """Replace the status of an earlier attempt, before any other rank can fail."""
        if self._rank == 0:
            self._write("running")

    def reached(self, step: int, epoch: int) -> None:
        """Record the optimizer steps and epochs done."""
        self.progress = {"step": step, "epoch": epoch}
        self.heartbeat()

    def heartbeat(self) -> None:
        """Update the time of the file, at most every ``HEARTBEAT_SECONDS``."""
        if self._rank == 0 and time.monotonic() - self._written > HEARTBEAT_SECONDS:
            with suppress(OSError):  # a full disk is reported by the next checkpoint
                self._write("running")

    def end(self, state: str, message: str | None = None) -> None:
        """Record that the run is done or interrupted."""
        if self._rank == 0:
            self._write(state, message)

    def fail(self, message: str, traceback: str | None = None) -> bool:
        """Record an error of this rank. Returns False if another rank failed first and probably caused it."""
        if read_status(self._path).get("state") == "failed":
            return False
        with suppress(OSError):  # a full disk may be the error
            self._write("failed", message, traceback)
        return True

    def _write(self, state: str, message: str | None = None, traceback: str | None = None) -> None:
        self._written = time.monotonic()
        content: dict[str, Any] = {"state": state, "message": message, **self.progress}
        content["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content |= {"host": socket.gethostname(), "pid": os.getpid(), "job": slurm_job(), "rank": self._rank}
        content["traceback"] = traceback
        write_text_atomic(self._path, json.dumps(content) + "\n")
