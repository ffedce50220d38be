"""The training loop: L = w_m CE_m + beta MIM (Eqs. 9-10), one unit a micro-step, on the DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lvlm_clorae.data.batches import Batch, training_batches
from lvlm_clorae.data.plan import EpochPlan
from lvlm_clorae.errors import UserError
from lvlm_clorae.losses.achievement import AchievementState
from lvlm_clorae.training import checkpoint, distributed
from lvlm_clorae.training.adapters import side_loss
from lvlm_clorae.training.evaluation import evaluate
from lvlm_clorae.training.export import save_adapter
from lvlm_clorae.training.job import Job
from lvlm_clorae.training.reporting import total_f1
from lvlm_clorae.training.schedule import learning_rate


@dataclass
class Progress:
    """Where a run stands; with the achievement state, all that a checkpoint holds beside DeepSpeed's own."""

    epoch: int = 0
    micro_step: int = 0
    """Micro-steps of this epoch that are done."""
    step: int = 0
    """Optimizer steps done since the start."""
    best: float = -1.0
    """Highest sum of dev F1."""
    block: int = 0
    """Samples of one unit that all ranks read in a row, fixed at the start (see data/plan.py)."""
    dev: dict[str, float] = field(default_factory=dict)
    """Last dev F1 by unit."""


def train(job: Job) -> Progress:
    """Train to the last epoch, from the checkpoint of ``job`` where there is one. Collective."""
    config, engine, report = job.config, job.engine, job.report
    progress, achievement = _start(job)
    steps_per_epoch = -(-_micro_steps(job, progress) // config.accumulation)
    total = min(steps_per_epoch * config.epochs, config.max_steps or steps_per_epoch * config.epochs)
    metrics = job.open_metrics(progress.step)

    while progress.epoch < config.epochs:
        in_epoch = _micro_steps(job, progress)
        report.begin(
            f"epoch {progress.epoch + 1}/{config.epochs}", steps_per_epoch, progress.micro_step // config.accumulation
        )
        batches = _batches(job, progress)
        while progress.micro_step < in_epoch and progress.step < total:
            window = min(config.accumulation, in_epoch - progress.micro_step)
            rate = learning_rate(config, progress.step, total, steps_per_epoch)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            losses = []
            for number in range(1, window + 1):
                batch = next(batches)
                weight = achievement.weights[batch.unit.name]
                losses.append(micro_step(job, batch, weight, window, last=number == window))
            progress.micro_step += window
            progress.step += 1
            _log(job, metrics, progress, losses, batch, rate)
            if progress.step % config.checkpoint_every == 0:
                _save(job, progress, achievement)
        if progress.micro_step < in_epoch:
            break  # max_steps
        _save(job, progress, achievement)  # so that a kill in the evaluation does not cost the epoch's last steps
        _end_epoch(job, metrics, progress, achievement)
    _save(job, progress, achievement)
    metrics.close()
    return progress


def micro_step(job: Job, batch: Batch, weight: float, window: int, last: bool) -> torch.Tensor:
    """Forward and backward of one micro-batch; with ``last`` of its window also the optimizer step.

    Both losses are means over the tokens of all ranks' rows together, so that the same samples give the same gradient
    on any number of ranks.

    Returns:
        loss, CE and the adapter's own loss of all ranks, ``[3]``, detached.
    """
    engine, ranks = job.engine, distributed.world_size()
    tensors = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in batch.tensors.items()}
    targets = distributed.sum_over_ranks((tensors["labels"] != -100).sum().float())
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
    return distributed.sum_over_ranks(torch.stack([loss, ce, side]).detach().float()) / ranks


def _start(job: Job) -> tuple[Progress, AchievementState]:
    config = job.config
    # Without the achievement loss the weights are never updated: all stay 1.
    achievement = AchievementState(
        job.units,
        {name: unit.reference_f1 or 100.0 for name, unit in job.units.items()},
        gamma=config.gamma,
        margin=config.margin,
        normalise=config.normalise if config.achievement else "none",
        ema=config.ema,
    )
    progress = Progress(block=config.micro_batch * distributed.world_size())
    found = checkpoint.complete_checkpoints(job.directory) if config.resume else []
    if found:
        state = checkpoint.load(found[-1], job.engine)
        progress = Progress(**state["progress"])
        achievement.load_state_dict(state["achievement"])
        job.report.say(f"resumed from {found[-1]}: epoch {progress.epoch + 1}, step {progress.step}")
    elif config.resume:
        job.report.say("nothing to resume from: starting from the beginning")
    return progress, achievement


def _plan(job: Job, progress: Progress) -> EpochPlan:
    shards = {
        name: [shard.samples for shard in job.train.reader.shards(unit.dataset, "train")]
        for name, unit in job.units.items()
    }
    return EpochPlan(shards, progress.block, job.config.seed, progress.epoch)


def _micro_steps(job: Job, progress: Progress) -> int:
    return len(_plan(job, progress)) * progress.block // (job.config.micro_batch * distributed.world_size())


def _batches(job: Job, progress: Progress) -> Iterator[Batch]:
    return training_batches(
        job.train,
        job.units,
        _plan(job, progress),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch=job.config.micro_batch,
        start=progress.micro_step,
        workers=job.config.workers,
    )


def _log(job: Job, metrics: Any, progress: Progress, losses: list[torch.Tensor], batch: Batch, rate: float) -> None:
    if progress.step % job.config.log_every and not job.report.console.is_terminal:
        job.report.advance()
        return
    loss, ce, side = torch.stack(losses).mean(0).tolist()
    samples = job.report.steps_per_second() * progress.block * job.config.accumulation
    job.report.advance(detail=f"loss {loss:.4f}  {samples:.0f} samples/s  lr {rate:.1e}")
    if not torch.isfinite(torch.tensor(loss)):
        raise UserError(
            f"The loss is {loss} at step {progress.step} ({batch.unit.name}, keys {', '.join(batch.keys)}). "
            "Lower learning_rate, or look at these samples."
        )
    if progress.step % job.config.log_every == 0:
        values = {"loss": loss, "ce": ce, "lr": rate, "epoch": progress.epoch, "unit": batch.unit.name}
        if job.side_loss:
            values[job.side_loss] = side
        metrics.write(progress.step, "train", **values)


def _end_epoch(job: Job, metrics: Any, progress: Progress, achievement: AchievementState) -> None:
    """Dev F1, the weights of the next epoch, ``best/``."""
    config = job.config
    progress.epoch, progress.micro_step = progress.epoch + 1, 0
    if job.dev is None or (progress.epoch % config.evaluate_every and progress.epoch < config.epochs):
        return
    units = job.dev_units
    job.report.begin(f"dev {progress.epoch}/{config.epochs}", job.count(units, "dev"))
    counts = evaluate(
        job.model,
        job.dev,
        units.values(),
        batch_size=config.eval_batch,
        max_new_tokens=config.max_answer_length,
        advance=job.report.advance,
    )
    used = dict(achievement.weights)
    progress.dev = {name: count.f1 for name, count in counts.items()}
    if config.achievement:
        achievement.update({name: f1 for name, f1 in progress.dev.items() if name in job.units})
    columns = {"weight": {**dict.fromkeys(counts, float("nan")), **used}}
    columns["next"] = {**dict.fromkeys(counts, float("nan")), **achievement.weights}
    job.report.scores(f"dev after epoch {progress.epoch}", counts, columns)
    metrics.write(progress.step, "dev", epoch=progress.epoch, f1=progress.dev, weights=achievement.weights)
    if total_f1(counts) > progress.best:
        progress.best = total_f1(counts)
        save_adapter(job, job.directory / "best", "dev", counts)


def _save(job: Job, progress: Progress, achievement: AchievementState) -> None:
    state = {"progress": vars(progress), "achievement": achievement.state_dict()}
    checkpoint.save(job.directory, job.engine, progress.step, state, job.config.keep_checkpoints)
