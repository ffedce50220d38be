"""The training loop: L = w_m CE_m + beta MIM (Eqs. 9-10), one unit a micro-step, on the DeepSpeed engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lvlm_clorae.analysis.progress import plot_progress
from lvlm_clorae.data.batches import Batch
from lvlm_clorae.data.stream import BadSamples, TrainingStream
from lvlm_clorae.errors import UserError
from lvlm_clorae.losses.achievement import AchievementState
from lvlm_clorae.training import checkpoint, distributed, nonfinite
from lvlm_clorae.training.adapters import side_loss
from lvlm_clorae.training.conflicts import measure_conflicts
from lvlm_clorae.training.export import save_adapter
from lvlm_clorae.training.job import Job
from lvlm_clorae.training.preemption import Interrupted, wished
from lvlm_clorae.training.progress import Progress
from lvlm_clorae.training.reporting import total_f1
from lvlm_clorae.training.schedule import learning_rate


def train(job: Job) -> Progress:
    """Train to the last epoch, from the checkpoint of ``job`` where there is one. Collective.

    Raises:
        UserError: on every rank: loss or gradient are not finite, a checkpoint cannot be read or written.
        Interrupted: on every rank: one of them was told to stop, and a checkpoint of the last step is written.
    """
    config, engine, report = job.config, job.engine, job.report
    stream, progress, achievement = _start(job)
    steps_per_epoch = -(-len(stream) // config.accumulation)
    total = min(steps_per_epoch * config.epochs, config.max_steps or steps_per_epoch * config.epochs)
    metrics, bad = job.open_metrics(progress.step), BadSamples()

    while stream.epoch < config.epochs and not _given_up(job, progress):
        in_epoch = len(stream)
        report.begin(
            f"epoch {stream.epoch + 1}/{config.epochs}", steps_per_epoch, stream.micro_step // config.accumulation
        )
        batches = iter(stream)
        while stream.micro_step < in_epoch and progress.step < total:
            due = config.log_conflicts and progress.step % config.log_conflicts == 0
            if due and not measure_conflicts(job, metrics, progress.step):
                _save(job, stream, progress, achievement)
                raise Interrupted(f"saved at step {progress.step}, epoch {stream.epoch + 1}")
            window = min(config.accumulation, in_epoch - stream.micro_step)
            rate = learning_rate(config, progress.step, total, steps_per_epoch)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            done = []
            for number in range(1, window + 1):
                batch = next(batches)
                bad.add(batch.bad)
                weight = achievement.weights[batch.unit.name]
                done.append((batch, *micro_step(job, batch, weight, window, last=number == window)))
            progress.step += 1
            losses = torch.stack([of_all for _, of_all, _ in done]).cpu()  # the one time a step that waits for a GPU
            if not (engine.was_step_applied() and losses[:, 0].isfinite().all()):
                progress.skip()
                nonfinite.answer(job, progress, [(batch, own) for batch, _, own in done])
            else:
                progress.skipped_in_a_row = 0
            _log(job, metrics, stream, progress, losses, batch, rate)
            stop = losses[:, 4].any()
            if progress.step % config.checkpoint_every == 0 or stop:
                _save(job, stream, progress, achievement)
            if stop:
                raise Interrupted(f"saved at step {progress.step}, epoch {stream.epoch + 1}")
        if stream.micro_step < in_epoch:
            break  # max_steps
        _save(job, stream, progress, achievement)  # so that a kill in the evaluation costs no steps of the epoch
        _end_epoch(job, metrics, stream, progress, achievement)
    _save(job, stream, progress, achievement)
    metrics.close()
    return progress


def micro_step(job: Job, batch: Batch, weight: float, window: int, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward of one micro-batch; with ``last`` of its window also the optimizer step.

    Both losses are means over the tokens of all ranks' rows together, so that the same samples give the same gradient
    on any number of ranks.

    Returns:
        of all ranks, ``[5]``: loss, CE, the adapter's own loss, the number of bad samples, and how many ranks were told
        to stop; and of this rank, ``[]``: its part of the CE. Detached.
    """
    engine, ranks = job.engine, distributed.world_size()
    tensors = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in batch.tensors.items()}
    targets = distributed.sum_over_ranks((tensors["labels"] != -100).sum().float()).clamp(min=1)  # 0: all rows ignored
    if job.has_tasks:
        job.model.set_task(batch.unit.task)
    ce = engine(**tensors, num_items_in_batch=targets / ranks).loss
    loss = weight * ce
    side = ce.new_zeros(())
    if job.side_loss:
        side = side_loss(job.model)
        loss = loss + job.config.beta * side
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss * (job.config.accumulation / window))  # DeepSpeed divides by the accumulation
    engine.step()
    bad, stop = ce.new_tensor(len(batch.bad) * ranks), ce.new_tensor(float(wished() * ranks))
    of_all = distributed.sum_over_ranks(torch.stack([loss, ce, side, bad, stop]).detach().float()) / ranks
    return of_all, ce.detach()


def _check_batch(job: Job, before: int, where: Path) -> None:
    """Raises UserError where an optimizer step would have another number of samples than the checkpoint's run had."""
    now = _samples_per_step(job)
    if before != now:
        ranks, config = distributed.world_size(), job.config
        raise UserError(
            f"{where}: was written by a run with {before} samples an optimizer step, but this one has {now} "
            f"({ranks} ranks x micro_batch {config.micro_batch} x accumulation {config.accumulation}). "
            f"Set --micro-batch and --accumulation so that the product is {before}."
        )


def _samples_per_step(job: Job) -> int:
    return distributed.world_size() * job.config.micro_batch * job.config.accumulation


def _start(job: Job) -> tuple[TrainingStream, Progress, AchievementState]:
    config, stream, progress = job.config, job.stream(), Progress()
    # Without the achievement loss the weights are never updated: all stay 1.
    achievement = AchievementState(
        job.units.train,
        job.units.reference(),
        gamma=config.gamma,
        margin=config.margin,
        normalise=config.normalise if config.achievement else "none",
        ema=config.ema,
    )
    found = checkpoint.complete_checkpoints(job.directory) if config.resume else []
    if found:
        state = checkpoint.load(found[-1], job.engine, job.identity)
        _check_batch(job, state["samples_per_step"], found[-1])
        progress = Progress(**state["progress"])
        stream.load_state_dict(state["stream"])
        achievement.load_state_dict(state["achievement"])
        job.report.say(f"resumed from {found[-1]}: epoch {stream.epoch + 1}, step {progress.step}")
    elif config.resume:
        job.report.say("nothing to resume from: starting from the beginning")
    return stream, progress, achievement


def _log(
    job: Job,
    metrics: Any,
    stream: TrainingStream,
    progress: Progress,
    losses: torch.Tensor,
    batch: Batch,
    rate: float,
) -> None:
    progress.bad_samples += int(losses[:, 3].sum())
    job.status.reached(progress.step, stream.epoch)
    if progress.step % job.config.log_every and not job.report.console.is_terminal:
        job.report.advance()
        return
    loss, ce, side, *_ = losses.mean(0).tolist()
    samples = job.report.steps_per_second() * stream.samples_per_micro_step * job.config.accumulation
    job.report.advance(detail=f"loss {loss:.4f}  {samples:.0f} samples/s  lr {rate:.1e}")
    if progress.step % job.config.log_every == 0:
        values = {"loss": loss, "ce": ce, "lr": rate, "epoch": stream.epoch, "unit": batch.unit.name}
        for name in ("bad_samples", "skipped"):
            if getattr(progress, name):
                values[name] = getattr(progress, name)
        if job.side_loss:
            values[job.side_loss] = side
        metrics.write(progress.step, "train", **values)


def _end_epoch(
    job: Job, metrics: Any, stream: TrainingStream, progress: Progress, achievement: AchievementState
) -> None:
    """Dev F1, the weights of the next epoch, ``best/``."""
    config = job.config
    stream.next_epoch()
    job.status.reached(progress.step, stream.epoch)
    if job.dev is None or (stream.epoch % config.evaluate_every and stream.epoch < config.epochs):
        return
    job.report.begin(f"dev {stream.epoch}/{config.epochs}", len(job.dev))
    counts = job.dev(job.model, advance=job.advance).counts
    used = dict(achievement.weights)
    progress.dev = {name: count.f1 for name, count in counts.items()}
    if config.achievement:
        set_weights(achievement, {name: f1 for name, f1 in progress.dev.items() if name in job.units.train})
    columns = {"weight": {**dict.fromkeys(counts, float("nan")), **used}}
    columns["next"] = {**dict.fromkeys(counts, float("nan")), **achievement.weights}
    job.report.scores(f"dev after epoch {stream.epoch}", counts, columns)
    metrics.write(progress.step, "dev", epoch=stream.epoch, f1=progress.dev, weights=achievement.weights)
    distributed.on_first_rank(lambda: plot_progress(job.directory))
    progress.waited += 1
    if total_f1(counts) > progress.best:
        progress.best, progress.waited = total_f1(counts), 0
        save_adapter(job, job.directory / "best", "dev", counts)


def set_weights(achievement: AchievementState, f1: dict[str, float]) -> None:
    """The weights after an evaluation, rank 0's on every rank: another machine's `exp` may round otherwise."""
    achievement.update(f1)
    achievement.load_state_dict(distributed.on_first_rank(achievement.state_dict))


def _given_up(job: Job, progress: Progress) -> bool:
    """Whether ``patience`` has run out."""
    patience = job.config.patience
    if patience is None or progress.waited < patience:
        return False
    job.report.say(f"All on dev is {progress.best:.1f} at best, {progress.waited} evaluations ago: training ends here")
    return True


def _save(job: Job, stream: TrainingStream, progress: Progress, achievement: AchievementState) -> None:
    if progress.step == 0:
        return
    state: dict[str, Any] = {"identity": job.identity, "samples_per_step": _samples_per_step(job)}
    state |= {"progress": vars(progress), "stream": stream.state_dict(), "achievement": achievement.state_dict()}
    checkpoint.save(job.directory, job.engine, progress.step, state, job.config.keep_checkpoints)
