"""What becomes of an optimizer step whose loss or gradient is not finite. DeepSpeed has left its update out by then."""

from __future__ import annotations

import torch

from lvlm_clorae.data.batches import Batch
from lvlm_clorae.errors import UserError
from lvlm_clorae.training import distributed
from lvlm_clorae.training.job import Job
from lvlm_clorae.training.progress import Progress

MOST_IN_A_ROW = 10
"""So many such steps one after another end a run that skips them: the weights themselves must be at fault."""


def answer(job: Job, progress: Progress, window: list[tuple[Batch, torch.Tensor]]) -> None:
    """Stop, or tell and go on, as the setting ``on_nonfinite`` says. Collective.

    Args:
        window: the micro-batches of this rank, each with its part of the CE ``[]``

    Raises:
        UserError: on every rank, naming the samples; with the policy ``skip`` only where skipping does not help.
    """
    mine = [f"{batch.unit.name} {key}" for batch, ce in window if not ce.isfinite() for key in batch.keys]
    found = distributed.gathered(mine)

    def tell() -> None:
        units = ", ".join(dict.fromkeys(batch.unit.name for batch, _ in window))
        where = f"of these samples: {_some(found)}" if found else f"though the losses are ({units})"
        what = f"{'The loss' if found else 'The gradient'} is not finite at step {progress.step}, {where}."
        if job.engine.was_step_applied():
            raise UserError(f"{what} This DeepSpeed has changed the weights by it: bring a newer one.")
        if job.config.on_nonfinite == "stop":
            raise UserError(
                f"{what} No weight was changed by it. Lower learning_rate, or look at these samples; "
                "--resume auto --on-nonfinite skip goes on and leaves such steps out."
            )
        if progress.skipped_in_a_row >= MOST_IN_A_ROW:
            raise UserError(f"{what} The last {MOST_IN_A_ROW} steps were all like that. Lower learning_rate.")
        job.report.say(f"{what} The step is skipped, as {progress.skipped - 1} before it.")

    distributed.on_first_rank(tell)


def _some(names: list[str], most: int = 16) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
