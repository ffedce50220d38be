"""The main job: configuration, checks, training, test scores, the adapter directory."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.quiet import quiet_libraries
from lvlm_clorae.training import preemption
from lvlm_clorae.training.config import TrainConfig, load_config
from lvlm_clorae.training.preemption import Interrupted

if TYPE_CHECKING:
    from lvlm_clorae.data.shard_reader import ShardReader
    from lvlm_clorae.training.job import Job
    from lvlm_clorae.training.status import Status


def entry() -> NoReturn:
    """The program: takes signals from its first moment, and leaves without waiting for ranks that will not answer."""
    preemption.listen()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    raise SystemExit(0)


def main(argv: list[str] | None = None) -> int:
    """Run the job of the command line.

    Returns:
        0 done; 2 the user has something to mend; 75 interrupted and saved, to be gone on with; 1 a fault
    """
    rank = os.environ.get("RANK", "0")
    quiet_libraries()
    try:
        run(*prepare(argv))
    except Interrupted as error:
        if rank == "0":
            print(f"interrupted: {error}. The same command with --resume auto goes on.", file=sys.stderr)
        return preemption.EXIT_CODE
    except UserError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        elif not error.everywhere:
            print(f"error on rank {rank}: {error}", file=sys.stderr)
        return error.exit_code
    except _Consequence:
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


class _Consequence(Exception):
    """This rank could not go on since another had failed, which has told why: its words are to stand last."""


def prepare(argv: list[str] | None) -> tuple[TrainConfig, ShardReader, dict[str, Any]]:
    """The configuration, the reader of its shards and the content of its DeepSpeed file, all checked.

    Raises:
        UserError: on every rank alike.
    """
    from lvlm_clorae.training.checks import check_run

    try:
        config = load_config(argv)
        return config, *check_run(config)
    except UserError as error:
        error.everywhere = True
        raise


def run(config: TrainConfig, reader: ShardReader, deepspeed_file: dict[str, Any]) -> None:
    """Train, evaluate on test, export. Collective.

    Raises:
        UserError: with ``everywhere`` where every rank raises it alike.
        Interrupted: on every rank.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # its bar would stand in every log

    from lvlm_clorae.training import distributed
    from lvlm_clorae.training.run_directory import open_run
    from lvlm_clorae.training.status import Status

    distributed.start(config.collective_timeout)
    directory = distributed.on_first_rank(lambda: open_run(config))
    status = Status(directory, distributed.rank())
    distributed.on_first_rank(status.start)
    try:
        _run(config, reader, deepspeed_file, directory, status)
        status.end("done")
    except Interrupted as error:
        status.end("interrupted", str(error))
        distributed.stop()
        raise
    except UserError as error:
        status.fail(str(error))
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _fail(status, error)
        status.fail(str(error))
        raise UserError(f"{error}. Make room, then go on with the same command and --resume auto.") from None
    except Exception as error:
        _fail(status, error)
    distributed.stop()  # not after an error: the other ranks may still be waiting in a collective


def _run(
    config: TrainConfig, reader: ShardReader, deepspeed_file: dict[str, Any], directory: Path, status: Status
) -> None:
    from lvlm_clorae.training import distributed
    from lvlm_clorae.training.job import build
    from lvlm_clorae.training.loop import train
    from lvlm_clorae.training.reporting import Reporter

    def stop_if_told(when: str) -> None:
        if distributed.any_rank(preemption.wished()):
            raise Interrupted(f"{when}, of which nothing was lost")

    stop_if_told("before the model was loaded")
    with Reporter(distributed.rank() == 0, config.log_every) as report:
        job = build(config, reader, deepspeed_file, directory, report, status)
        report.say(_describe(job))
        stop_if_told("before the first step")
        if config.adapter != "none":
            train(job)
            report.say(f"peak memory of a rank: {distributed.peak_memory() / 2**30:.2f} GiB")
        _finish(job)
        report.say(f"run directory: {directory}")


def _fail(status: Status, error: Exception) -> NoReturn:
    """Raise ``error``, or in its place the notice that another rank's failure is behind it."""
    from torch.distributed import DistError

    first = status.fail(f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc())
    if not first:
        raise _Consequence from error
    if isinstance(error, DistError) or "gloo" in str(error):
        print("Another rank is gone or does not answer; it may have been killed, for want of memory.", file=sys.stderr)
    raise error


def _describe(job: Job) -> str:
    from lvlm_clorae.models.parts import PartSize, part_sizes
    from lvlm_clorae.training import distributed

    parts = part_sizes(job.model)
    whole = sum(parts.values(), PartSize())
    memory = ", ".join(
        f"{part} {size.bytes / 2**20:.1f} MiB ({size.bytes / (4 * size.parameters):.2f} of fp32)"
        for part, size in parts.items()
        if part != "adapter"
    )
    reference = job.units.reference()
    sizes = ", ".join(
        f"{name} {job.index.dataset(unit.dataset).samples('train')} ({reference[name]:g})"
        for name, unit in job.units.train.items()
    )
    return (
        f"{job.config.model} with {job.config.adapter}: {whole.trained / 1e6:.2f} M of {whole.parameters / 1e6:.2f} M "
        f"parameters trained, {distributed.world_size()} rank(s) on {distributed.device().type}\n"
        f"weights of the base: {memory}\ntraining samples (and reference F1): {sizes}"
    )


def _finish(job: Job) -> None:
    """Test F1, predictions, and the adapter directory with the scores in its card."""
    from lvlm_clorae.training import distributed
    from lvlm_clorae.training.export import save_adapter
    from lvlm_clorae.training.reporting import scores_json

    counts: dict[str, Any] = {}
    if job.units.test:
        folder = job.directory / "predictions"
        distributed.on_first_rank(lambda: folder.mkdir(exist_ok=True))
        test = job.evaluation("test")
        job.report.begin("test", len(test))
        evaluated = test(job.model, advance=job.advance)
        evaluated.write(folder)
        counts = evaluated.counts
        job.report.scores("test", counts)
        distributed.on_first_rank(lambda: write_text_atomic(job.directory / "scores.json", scores_json(counts)))
    if job.config.adapter != "none":
        save_adapter(job, job.directory / "adapter", "test", counts)
