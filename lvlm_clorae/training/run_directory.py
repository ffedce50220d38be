"""The run directory: whose it is, its metrics and its files.

config.yaml  metrics.jsonl  tensorboard/  checkpoints/step-*/  best/  predictions/  scores.json  adapter/
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.training.config import TrainConfig, read_config

# What may differ between a run and its resumption; the rest decides the result.
MAY_CHANGE = {
    *("output", "resume", "checkpoint_every", "keep_checkpoints", "log_every", "collective_timeout", "on_nonfinite"),
    *("deepspeed", "workers", "eval_batch", "cache_dir", "cache_gib", "on_bad_sample", "gradient_checkpointing"),
    "log_conflicts",
    *("micro_batch", "accumulation", "block"),  # of which checkpoints hold the product with the ranks
}


def open_run(config: TrainConfig) -> Path:
    """The directory of this run, made if it is new, with its ``config.yaml``.

    With ``resume=auto`` the run's own directory is taken up again where there is one. Without ``output`` the name is
    ``runs/<model>-<adapter>``, with the next free number where that is taken.

    Raises:
        UserError: as :func:`find_run`, or the directory cannot be made.
    """
    directory = find_run(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text_atomic(directory / "config.yaml", config.to_yaml())
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}). Choose another --output.") from None
    return directory


def find_run(config: TrainConfig) -> Path:
    """The directory that :func:`open_run` would give; nothing is written.

    Raises:
        UserError: the directory holds something that is not this run.
    """
    directory = _default_directory(config) if config.output is None else Path(config.output)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file, but the run needs a directory. Choose another --output.")
    if directory.is_dir() and any(directory.iterdir()):
        _check_own(directory, config)
    return directory


def _default_directory(config: TrainConfig) -> Path:
    stem = f"{Path(config.model).name}-{config.adapter}"
    number, path = 1, Path("runs") / stem
    while path.exists():
        following = Path("runs") / f"{stem}-{number + 1}"
        if config.resume and not following.exists():
            return path
        number, path = number + 1, following
    return path


def _check_own(directory: Path, config: TrainConfig) -> None:
    path = directory / "config.yaml"
    if not path.is_file():
        raise UserError(f"{directory}: is not empty and holds no run. Nothing is overwritten: choose another --output.")
    try:
        earlier = read_config(path)
    except UserError as error:
        raise UserError(f"{directory}: holds a foreign config.yaml ({error}) Choose another --output.") from None
    if config.resume is None:
        raise UserError(f"{directory}: already holds a run. Go on by --resume auto, or choose another --output.")
    for name, value in vars(config).items():
        if name not in MAY_CHANGE and getattr(earlier, name) != value:
            raise UserError(
                f"{directory}: holds a run with {name} = {getattr(earlier, name)}, but this one has {value}. "
                f"Resume with the same setting, or choose another --output."
            )


class Metrics:
    """``metrics.jsonl`` and TensorBoard events, written by rank 0 alone.

    Args:
        directory: the run directory
        step: the optimizer step from which the run goes on: what an interrupted run wrote after it is dropped, since it
            is computed again
    """

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = directory / "metrics.jsonl"
        # A checkpoint is written before its epoch's evaluation, which is then done again at a step that is kept.
        self._kept: set[tuple[int, str]] = set()
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            self._kept = {(record["step"], record["kind"]) for record in map(json.loads, kept)}
            write_text_atomic(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed in close()
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """One record; numbers, also one level down, become TensorBoard scalars ``kind/name``.

        What an interrupted run wrote of this kind at this step already is not written again.
        """
        if (step, kind) in self._kept:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            for key, number in value.items() if isinstance(value, dict) else ((None, value),):
                if isinstance(number, int | float):
                    self._board.add_scalar(f"{kind}/{name}" + (f"/{key}" if key else ""), number, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _step_of(line: str) -> float:
    try:
        record = json.loads(line)
        return float(record["step"]) if "kind" in record else float("inf")
    except (ValueError, KeyError, TypeError):  # a line cut off by a kill
        return float("inf")


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new directory and put it at ``target``; a kill leaves the old one or the new one."""
    import shutil

    fresh, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
