"""The main job: configuration, checks, training, test scores, the adapter directory.

Heavy modules are imported inside functions, so that signals are handled and ``--help`` answers before these are loaded.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lvlm_clorae.errors import UserError
from lvlm_clorae.files import long_names
from lvlm_clorae.imports import RARELY_USED, load_at_first_use
from lvlm_clorae.quiet import quiet_libraries
from lvlm_clorae.training import preemption
from lvlm_clorae.training.config import PROJECTOR, TrainConfig
from lvlm_clorae.training.config_loading import load_config
from lvlm_clorae.training.preemption import Interrupted

if TYPE_CHECKING:
    from lvlm_clorae.data.dataset import ShardDataset
    from lvlm_clorae.training.run_directory import Status


def entry(argv: list[str] | None = None, prog: str = "train.py") -> NoReturn:
    """Handle signals, run :func:`main` and exit; after an error without waiting for ranks that may never answer."""
    preemption.listen()
    load_at_first_use(*RARELY_USED)
    code = main(argv, prog)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    raise SystemExit(0)


@quiet_libraries()
def main(argv: list[str] | None = None, prog: str = "train.py") -> int:
    """Run the job of the command line.

    Returns:
        the exit code: 0 done; 2 an error that the user can fix; 75 interrupted and saved; 1 any other error
    """
    rank = os.environ.get("RANK", "0")
    try:
        with long_names():
            run(*_prepare(argv, prog))
    except Interrupted as error:
        if rank == "0":
            print(f"interrupted: {error}", file=sys.stderr)
        return preemption.EXIT_CODE
    except UserError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        elif not error.everywhere:
            print(f"error on rank {rank}: {error}", file=sys.stderr)
        return error.exit_code
    except _OtherRankFailed:
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


class _OtherRankFailed(Exception):
    """This rank failed because another one did. Nothing is printed, so that the cause stays the last message."""


def _prepare(argv: list[str] | None, prog: str) -> tuple[TrainConfig, ShardDataset, dict[str, Any]]:
    """Return the checked configuration, dataset and content of the DeepSpeed file. Every rank raises the same error."""
    try:
        config = load_config(argv, prog)
        from lvlm_clorae.training.checks import check_run  # after --help and mistakes in flags

        return config, *check_run(config)
    except UserError as error:
        error.everywhere = True
        raise


def run(config: TrainConfig, dataset: ShardDataset, deepspeed_file: dict[str, Any]) -> None:
    """Train, evaluate on the held-out split and export. Collective.

    Raises:
        UserError: with ``everywhere`` set if every rank raises the same.
        Interrupted: on every rank.
    """
    from lvlm_clorae.training.run_directory import Status, find_run, how_to_resume, is_done, open_run

    first = os.environ.get("RANK", "0") == "0"
    if is_done(config, directory := find_run(config)):
        if first:
            scores = "caption_loss.json" if config.adapter == PROJECTOR else "scores.json"
            print(f"{directory}: the run is done; its scores are in {scores} and metrics.jsonl.")
        return
    if first:
        print(f"{config.model} with --adapter {config.adapter} on {config.shards}: starting", flush=True)
    import transformers  # with what follows for up to half a minute

    from lvlm_clorae.training import distributed
    from lvlm_clorae.training.operators import load_operators

    transformers.utils.logging.disable_progress_bar()
    try:
        load_operators(deepspeed_file if config.adapter != "none" else {})
    except Interrupted as error:
        raise Interrupted(f"{error}. {how_to_resume(directory)}") from None
    distributed.start(config.ddp_timeout)
    directory = distributed.on_first_rank(lambda: open_run(config))
    if first:
        print(f"run directory: {directory}", flush=True)
    status = Status(directory, distributed.rank())
    distributed.on_first_rank(status.start)
    try:
        _run(config, dataset, deepspeed_file, directory, status)
        status.end("done")
    except Interrupted as error:
        status.end("interrupted", str(error))
        distributed.stop()
        raise Interrupted(f"{error}. {how_to_resume(directory)}") from None
    except UserError as error:
        status.fail(str(error))
        raise
    except Exception as error:
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _fail(status, error)
        status.fail(str(error))
        raise UserError(f"{error}. Free disk space. {how_to_resume(directory)}") from None
    distributed.stop()  # not after an error: the other ranks may still be waiting in a collective


def _run(
    config: TrainConfig, dataset: ShardDataset, deepspeed_file: dict[str, Any], directory: Path, status: Status
) -> None:
    from lvlm_clorae.training import distributed
    from lvlm_clorae.training.alignment import export_base
    from lvlm_clorae.training.checks import verify_shards
    from lvlm_clorae.training.export import score_and_export
    from lvlm_clorae.training.loop import train
    from lvlm_clorae.training.reporting import Reporter
    from lvlm_clorae.training.setup import build

    def stop_if_requested(when: str) -> None:
        if distributed.any_rank(preemption.stop_requested()):
            raise Interrupted(f"{when}, so nothing is lost")

    with Reporter(distributed.rank() == 0) as report:
        if config.verify_shards:
            report.say(f"{verify_shards(dataset)} local shards have the SHA-256 of their index")
        stop_if_requested("before the model was loaded")
        job = build(config, dataset, deepspeed_file, directory, report, status)
        report.say(job.describe())
        stop_if_requested("before the first step")
        if config.adapter != "none":
            train(job)
            report.say(f"peak memory of a rank: {distributed.peak_memory() / 2**30:.2f} GiB")
        (export_base if config.adapter == PROJECTOR else score_and_export)(job)
        report.say(f"run directory: {directory}")


def _fail(status: Status, error: Exception) -> NoReturn:
    """Raise ``error``, or _OtherRankFailed if another rank's failure probably caused it."""
    from torch.distributed import DistError

    first = status.fail(f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc())
    if not first:
        raise _OtherRankFailed from error
    if isinstance(error, DistError) or "gloo" in str(error):
        print("Another rank ended or does not answer. It may have been killed for lack of memory.", file=sys.stderr)
    raise error
