"""The main job: configuration, checks, training, test scores, the adapter directory."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.training.config import TrainConfig, load_config

if TYPE_CHECKING:
    from lvlm_clorae.data.shard_reader import ShardReader
    from lvlm_clorae.training.job import Job


def main(argv: list[str] | None = None) -> int:
    """Run the job of the command line; the exit code is 2 where the user has something to mend."""
    rank = os.environ.get("RANK", "0")
    try:
        run(*prepare(argv))
    except UserError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        elif not error.everywhere:
            print(f"error on rank {rank}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


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
    """
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|deepspeed)\.")
    transformers.utils.logging.disable_progress_bar()  # its bar would stand in every log

    from lvlm_clorae.training import distributed
    from lvlm_clorae.training.job import build
    from lvlm_clorae.training.loop import train
    from lvlm_clorae.training.reporting import Reporter
    from lvlm_clorae.training.run_directory import open_run

    distributed.start()
    directory = distributed.on_first_rank(lambda: open_run(config))
    with Reporter(distributed.rank() == 0, config.log_every) as report:
        job = build(config, reader, deepspeed_file, directory, report)
        report.say(_describe(job))
        if config.adapter != "none":
            train(job)
        _finish(job)
        report.say(f"run directory: {directory}")
    distributed.stop()  # not after an error: the other ranks may still be waiting in a collective


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
        evaluated = test(job.model, advance=job.report.advance)
        evaluated.write(folder)
        counts = evaluated.counts
        job.report.scores("test", counts)
        distributed.on_first_rank(lambda: write_text_atomic(job.directory / "scores.json", scores_json(counts)))
    if job.config.adapter != "none":
        save_adapter(job, job.directory / "adapter", "test", counts)
