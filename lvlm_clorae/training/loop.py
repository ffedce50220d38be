"""The training loop: L = w_m CE_m + beta MIM (Eqs. 9-10), one dataset task a micro-step, on the DeepSpeed engine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter

from lvlm_clorae.data.collate import Batch
from lvlm_clorae.data.index import SPLITS
from lvlm_clorae.data.limits import Limits, check_prompts, limits_table, measure_limits
from lvlm_clorae.errors import UserError, first_line
from lvlm_clorae.losses.achievement import AchievementState
from lvlm_clorae.losses.coba import CoBaState
from lvlm_clorae.training import checkpoint, distributed
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.dataset_tasks import make_weighting
from lvlm_clorae.training.dev_loss import dev_losses
from lvlm_clorae.training.export import save_adapter
from lvlm_clorae.training.gradients import aux_gradient_share, measure_conflicts
from lvlm_clorae.training.plots import plot_progress
from lvlm_clorae.training.preemption import Interrupted, stop_requested
from lvlm_clorae.training.reporting import clock, total_f1
from lvlm_clorae.training.run_directory import Metrics, complete_checkpoints, how_to_resume
from lvlm_clorae.training.setup import Run, compute_losses

SHARE_EVERY = 10
"""Records of the training loss per measurement of the auxiliary loss's gradient share."""
MAX_SKIPPED = 10
"""A run that skips non-finite steps ends after this many in a row: its weights have probably diverged."""


@dataclass
class TrainerState:
    """Progress of a run, saved in checkpoints beside the state of sampler, weights and optimizer.

    Args:
        step: optimizer steps done
        best: highest sum of dev F1
        waited: evaluations since the best one
        invalid_samples: samples of all ranks that were skipped or used without their image
        skipped: optimizer steps skipped because the loss or gradient was not finite
        skipped_in_a_row: skipped steps since the last one that was applied
        dev: last dev F1 by dataset task
    """

    step: NonNegativeInt = 0
    best: FiniteFloat = -1.0
    waited: NonNegativeInt = 0
    invalid_samples: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    skipped_in_a_row: NonNegativeInt = 0
    dev: dict[str, FiniteFloat] = field(default_factory=dict)


_STATE = TypeAdapter(TrainerState)


def train(run: Run) -> TrainerState:
    """Train to the last epoch, from the newest checkpoint if the run resumes. Collective.

    Raises Interrupted on every rank after a checkpoint of the last step, if one of them was asked to stop.
    """
    return _Trainer(run).train()


class _Trainer:
    def __init__(self, run: Run) -> None:
        config = run.config
        self.run, self.config, self.sampler, self.state = run, config, run.train_sampler(), TrainerState()
        self.weighting = make_weighting(config, run.dataset_tasks)
        self._resume()
        self.steps_per_epoch = -(-len(self.sampler) // config.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * config.num_train_epochs
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.metrics = Metrics(run.directory, self.state.step, active=distributed.rank() == 0)
        self.loader = run.train_dataloader(self.sampler)
        if self.state.step == 0:
            distributed.on_first_rank(self._report_limits)

    def _report_limits(self) -> None:
        """Print and record what the model cannot read or say. Raises UserError if labels do not fit in a prompt."""
        run, lengths = self.run, (self.config.max_source_length, self.config.max_target_length)
        for split in SPLITS:
            dataset, tasks = run.dataset.of_split(split), getattr(run.dataset_tasks, split).values()
            found = measure_limits(dataset, tasks, run.processor, *lengths)
            if self.config.on_invalid_sample == "error":
                check_prompts(found, lengths[0])
            if any(limits.any_cut for limits in found.values()):
                run.report.console.print(limits_table(found, f"what the model cannot read or say of {split}"))
            columns = {name: {task: vars(limits)[name] for task, limits in found.items()} for name in vars(Limits())}
            self.metrics.write(0, f"limits_{split}", **columns)

    def train(self) -> TrainerState:
        self._began, self._first_step = time.monotonic(), self.state.step
        self._train_epoch()  # also at the last step: a resumed run may have only the evaluation left
        while self.state.step < self.total_steps and not stops_early(self.run, self.state):
            self._train_epoch()
        self.metrics.close()
        return self.state

    def _train_epoch(self) -> None:
        """Train the rest of the epoch, or up to the last step, and evaluate."""
        config, sampler = self.config, self.sampler
        in_epoch = len(sampler)
        done = sampler.micro_step // config.gradient_accumulation_steps
        self.run.report.begin(f"epoch {sampler.epoch + 1}/{config.num_train_epochs}", self.steps_per_epoch, done)
        batches = iter(self.loader)
        while sampler.micro_step < in_epoch and self.state.step < self.total_steps:
            self._measure_conflicts()
            self._measure_convergence()
            self._optimizer_step(batches, min(config.gradient_accumulation_steps, in_epoch - sampler.micro_step))
        self._save()  # so that a kill in the evaluation does not repeat steps of the epoch
        self._end_epoch()

    def _optimizer_step(self, batches: Iterator[Batch], window: int) -> None:
        """Do one optimizer step of ``window`` micro-steps; log, save or stop after it."""
        run, state, engine = self.run, self.state, self.run.engine
        rate = learning_rate(self.config, state.step, self.total_steps, self.steps_per_epoch)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        measured = bool(run.aux_loss) and (state.step + 1) % (SHARE_EVERY * self.config.logging_steps) == 0
        done = []
        for number, batch in enumerate(islice(batches, window), 1):
            weight, last = self.weighting.weights[batch.dataset_task.name], number == window
            with aux_gradient_share(run, batch, window) if measured and last else nullcontext() as share:
                done.append((batch, *micro_step(run, batch, weight, window, last)))
        state.step += 1
        losses = torch.stack([of_all for _, of_all, _ in done]).cpu()  # the only synchronisation with a GPU in a step
        if engine.was_step_applied() and losses[:, 0].isfinite().all():
            state.skipped_in_a_row = 0
        else:
            handle_nonfinite(run, state, [(batch, own) for batch, _, own in done])
        state.invalid_samples += int(losses[:, 3].sum())
        self._log(losses, done[-1][0], rate, share() if share else None)
        if losses[:, 4].any():
            self._interrupt()
        if state.step % self.config.save_steps == 0:
            self._save()

    def _measure_conflicts(self) -> None:
        every, step = self.config.log_conflicts, self.state.step
        if every and step % every == 0 and not measure_conflicts(self.run, self.metrics, step):
            self._interrupt()

    def _measure_convergence(self) -> None:
        """Update CoBa's weights from the dev losses, if they are due at this step."""
        number, rest = divmod(self.state.step, self.config.coba_update_interval)
        if isinstance(self.weighting, CoBaState) and not rest:
            losses = dev_losses(self.run, number)
            set_weights(self.weighting, losses)
            values = {"dev_loss": losses, "divergence_factor": self.weighting.divergence}
            self.metrics.write(self.state.step, "coba", **values, weights=self.weighting.weights)

    def _interrupt(self) -> None:
        self._save()
        raise Interrupted(f"saved at step {self.state.step}, epoch {self.sampler.epoch + 1}")

    def _log(self, losses: torch.Tensor, batch: Batch, rate: float, share: float | None) -> None:
        run, state, sampler = self.run, self.state, self.sampler
        run.status.reached(state.step, sampler.epoch)
        due = state.step % self.config.logging_steps == 0
        if not due and not run.report.console.is_terminal:
            run.report.advance(detail="")
            return
        loss, ce, aux, *_ = losses.mean(0).tolist()
        steps = run.report.steps_per_second()
        samples = steps * self.config.gradient_accumulation_steps * sampler.samples_per_micro_step
        done = max(1, state.step - self._first_step)  # evaluations and checkpoints count in the time that is left
        left = clock((self.total_steps - state.step) * (time.monotonic() - self._began) / done)
        progress = f"step {state.step}/{self.total_steps}, {left} left"
        run.report.advance(detail=f"loss {loss:.4f}  {samples:.0f} samples/s  lr {rate:.1e}  {progress}")
        if not due:
            return
        values = {"loss": loss, "ce": ce, "lr": rate, "epoch": sampler.epoch, "dataset_task": batch.dataset_task.name}
        values |= {name: found for name in ("invalid_samples", "skipped") if (found := getattr(state, name))}
        if run.aux_loss:
            values[run.aux_loss] = aux
        if share is not None:
            values["aux_gradient_share"] = share
        self.metrics.write(state.step, "train", **values)

    def _end_epoch(self) -> None:
        """Evaluate on dev, update the achievement weights, and export the adapter to ``best/`` if it is the best."""
        run, config, sampler, state = self.run, self.config, self.sampler, self.state
        complete = sampler.micro_step >= len(sampler)  # unless max_steps ends it
        epoch = sampler.epoch + (1 if complete else round(sampler.micro_step / len(sampler), 2))
        if complete:
            sampler.set_epoch(sampler.epoch + 1)
        run.status.reached(state.step, sampler.epoch)
        if run.dev is None or (sampler.epoch % config.eval_every_epochs and state.step < self.total_steps):
            return
        run.report.begin(f"dev {epoch}/{config.num_train_epochs}", len(run.dev))
        counts = run.dev(run.model, advance=run.advance).counts
        used = dict(self.weighting.weights)
        state.dev = {name: count.f1 for name, count in counts.items()}
        if config.loss_weighting == "achievement":
            trained = {name: f1 for name, f1 in state.dev.items() if name in run.dataset_tasks.train}
            set_weights(self.weighting, trained)
        new = self.weighting.weights
        run.report.scores(f"dev after epoch {epoch}", counts, {"weight": used, "next": new})
        self.metrics.write(state.step, "dev", epoch=epoch, f1=state.dev, weights=new)
        distributed.on_first_rank(lambda: plot_progress(run.directory))
        state.waited += 1
        if total_f1(counts) > state.best:
            state.best, state.waited = total_f1(counts), 0
            save_adapter(run, run.directory / "best", "dev", counts)

    def _resume(self) -> None:
        """Load the newest checkpoint of a resumed run."""
        run = self.run
        if not self.config.resume_from_checkpoint:
            return
        found = complete_checkpoints(run.directory)
        if not found:
            run.report.say("no checkpoint to resume from: starting from the beginning")
            return
        automatic = self.config.resume_from_checkpoint == "auto"
        path, state = checkpoint.load(found if automatic else found[-1:], run.engine, run.fingerprint, run.report.say)
        samples, saved = _samples_per_step(self.config), state["samples_per_step"]
        if saved != samples:
            raise UserError(
                f"{path}: has {saved} samples per optimizer step, but {samples} in this run. Set "
                "--per_device_train_batch_size and --gradient_accumulation_steps so that their product with "
                f"{distributed.world_size()} ranks is {saved}."
            )
        self._restore(path, state)
        if not distributed.on_first_rank((run.directory / "best").is_dir):
            self.state.best = -1.0  # it was moved away with newer checkpoints
        run.status.reached(self.state.step, self.sampler.epoch)
        run.report.say(f"resumed from {path}: epoch {self.sampler.epoch + 1}, step {self.state.step}")

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        try:
            self.state = _STATE.validate_json(json.dumps(state["trainer"]), strict=True)
            self.sampler.load_state_dict(state["sampler"])
            self.weighting.load_state_dict(state["weighting"])
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: state.json is invalid ({first_line(error)}). Remove the checkpoint.") from None

    def _save(self) -> None:
        if self.state.step == 0:
            return
        state = {
            "fingerprint": self.run.fingerprint,
            "samples_per_step": _samples_per_step(self.config),
            "trainer": vars(self.state),
            "sampler": self.sampler.state_dict(),
            "weighting": self.weighting.state_dict(),
        }
        checkpoint.save(self.run.directory, self.run.engine, self.state.step, state, self.config.save_total_limit)


def micro_step(run: Run, batch: Batch, weight: float, window: int, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Run forward and backward of one micro-batch, and the optimizer step if it is the ``last`` of its window.

    Returns:
        detached, over all ranks ``[5]``: loss, cross-entropy, auxiliary loss, number of invalid samples, ranks asked to
        stop; and this rank's part of the cross-entropy, a scalar.
    """
    engine, ranks = run.engine, distributed.world_size()
    ce, aux = compute_losses(run, engine, batch)
    loss = weight * ce
    if run.aux_loss:
        loss = loss + run.config.beta * aux
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * (run.config.gradient_accumulation_steps / window))  # DeepSpeed divides by the accumulation
    engine.step()
    invalid, stop = ce.new_tensor(len(batch.invalid) * ranks), ce.new_tensor(float(stop_requested() * ranks))
    of_all = distributed.sum_over_ranks(torch.stack([loss, ce, aux, invalid, stop]).detach().float()) / ranks
    return of_all, ce.detach()


def learning_rate(config: TrainConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0) of ``total_steps``.

    After a linear warm-up it is constant, falls to zero (``linear``, ``cosine``), or is halved every ``step_epochs``
    epochs (``step``, the paper's schedule).
    """
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    factors = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "step": 0.5 ** (step // max(1, config.step_epochs * steps_per_epoch)),
    }
    return config.learning_rate * factors[config.lr_scheduler_type]


def handle_nonfinite(run: Run, state: TrainerState, window: list[tuple[Batch, torch.Tensor]]) -> None:
    """Count a step with a non-finite loss or gradient, which DeepSpeed did not apply. Collective.

    Raises UserError, naming the samples of ``window`` (micro-batches and cross-entropies) with a non-finite loss; with
    the policy ``skip`` only after ``MAX_SKIPPED`` steps in a row.
    """
    state.skipped += 1
    state.skipped_in_a_row += 1
    own = [f"{batch.dataset_task.name} {key}" for batch, ce in window if not ce.isfinite() for key in batch.keys]
    samples = distributed.gathered(own)

    def report() -> None:
        dataset_tasks = ", ".join(dict.fromkeys(batch.dataset_task.name for batch, _ in window))
        where = f"for these samples: {_shortened(samples)}" if samples else f"though the losses are ({dataset_tasks})"
        what = f"{'The loss' if samples else 'The gradient'} is not finite at step {state.step}, {where}."
        if run.engine.was_step_applied():
            raise UserError(f"{what} This release of DeepSpeed applied the step all the same: install a newer one.")
        if run.config.on_nonfinite_loss == "stop":
            raise UserError(
                f"{what} The step was not applied. Lower learning_rate, or check these samples. "
                f"{how_to_resume(run.directory)} With --on_nonfinite_loss skip such steps are skipped."
            )
        if state.skipped_in_a_row >= MAX_SKIPPED:
            raise UserError(f"{what} The last {MAX_SKIPPED} steps were skipped. Lower learning_rate.")
        run.report.say(f"{what} The step is skipped; {state.skipped} skipped so far.")

    distributed.on_first_rank(report)


def set_weights(weighting: AchievementState | CoBaState, measured: dict[str, float]) -> None:
    """Update the weights from rank 0's, since ``exp`` may differ between machines. Collective."""
    weighting.update(measured)
    weighting.load_state_dict(distributed.on_first_rank(weighting.state_dict))


def stops_early(run: Run, state: TrainerState) -> bool:
    """Return True if dev F1 has not improved for ``early_stopping_patience`` evaluations."""
    patience = run.config.early_stopping_patience
    if patience is None or state.waited < patience:
        return False
    run.report.say(f"early stopping: no improvement over All = {state.best:.1f} on dev in {state.waited} evaluations")
    return True


def _samples_per_step(config: TrainConfig) -> int:
    return distributed.world_size() * config.per_device_train_batch_size * config.gradient_accumulation_steps


def _shortened(names: list[str], limit: int = 16) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
