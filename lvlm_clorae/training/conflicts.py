"""Gradient conflict: how far the datasets pull the weights that they share in different directions.

At an optimizer step s each unit has two batches of its own, a fixed function of (seed, s, unit): as many rows as a
micro-step of all ranks. The gradient of its own cross-entropy, its achievement weight and any side loss left out, is
taken with respect to the weights that every task trains, and averaged over the ranks. The matrix has

    between units u, v:  the mean of the four cosines of a batch of u and a batch of v
    of a unit with itself:  the cosine of its two batches, so that noise can be told from conflict

With s_u the mean of a unit's two gradients, each of length one, these are <s_u, s_v> and 2 |s_u|^2 - 1. A rank keeps
its part of every s_u, in main memory and fp32.

Nothing of the training is touched: the gradients never reach ``.grad``, where DeepSpeed's hooks are, and the random
state, the stream, the task and the mode of the model are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lvlm_clorae.analysis.conflicts import plot_conflicts
from lvlm_clorae.data.batches import Batch, Instance
from lvlm_clorae.data.plan import UnitPass
from lvlm_clorae.data.units import Unit
from lvlm_clorae.training import distributed
from lvlm_clorae.training.job import Job
from lvlm_clorae.training.preemption import wished

OWN = frozenset({"expert_A", "expert_B", "mim_scale", "mim_rho"})
"""Weights of C-LoRAE that are not shared: the tasks' own, and those that the cross-entropy does not reach."""


def measure_conflicts(job: Job, metrics: Any, step: int) -> bool:
    """Measure before optimizer step ``step + 1`` and write a record and the plot. Collective.

    Returns:
        False where a rank was told to stop meanwhile: then nothing is written.
    """
    weights = shared_weights(job.model)
    directions = []
    with _apart(job):
        for unit in job.units.train.values():
            if distributed.any_rank(wished()):
                return False
            first, second = (_direction(job, batch, weights) for batch in probe_batches(job, unit, step))
            directions.append((first + second) / 2)
            job.status.pulse()
    record = summary(list(job.units.train), cosines(directions))
    metrics.write(step, "conflicts", **record)
    distributed.on_first_rank(lambda: plot_conflicts(job.directory))
    job.report.say(_line(step, record))
    return True


def shared_weights(model: nn.Module) -> list[nn.Parameter]:
    """What is trained for every task alike, in the model's order."""
    named = model.named_parameters()
    return [weight for name, weight in named if weight.requires_grad and name.rpartition(".")[2] not in OWN]


def probe_batches(job: Job, unit: Unit, step: int) -> Iterator[Batch]:
    """This rank's part of the unit's two batches: other samples in each, as long as the unit has enough of them."""
    config, batcher = job.config, job.batcher("train")
    wide = config.micro_batch * distributed.world_size()
    sizes = [shard.samples for shard in job.reader.shards(unit.dataset, "train")]
    order = UnitPass(unit.name, sizes, 2 * wide, config.seed, f"conflicts at {step}")
    first = distributed.rank() * config.micro_batch
    for half in range(2):  # every other lane, so that both batches come from all shards
        places = [order.place(0, 2 * row + half) for row in range(first, first + config.micro_batch)]
        yield batcher([Instance(unit, place) for place in places])


def cosines(directions: Sequence[Tensor]) -> Tensor:
    """The matrix ``[U, U]``, on the CPU; NaN where a gradient was zero or not finite. Collective.

    Args:
        directions: of each unit this rank's part of s_u
    """
    own = [torch.stack([first @ second for second in directions]) for first in directions]
    products = distributed.sum_over_ranks(torch.stack(own).to(distributed.device())).cpu()
    products.diagonal().mul_(2).sub_(1)
    return products


def summary(units: list[str], matrix: Tensor) -> dict[str, Any]:
    """The record: mean cosine between units and within one, share of the pairs below zero, units, matrix.

    What cannot be told, as between units where there is one, is None.
    """
    pairs = matrix[torch.triu(torch.ones_like(matrix, dtype=torch.bool), diagonal=1)]
    pairs, own = (values[~values.isnan()] for values in (pairs, matrix.diagonal()))
    return {
        "between": _mean(pairs),
        "within": _mean(own),
        "negative": _mean((pairs < 0).float()),
        "units": units,
        "matrix": [[None if value != value else round(value, 6) for value in row] for row in matrix.tolist()],
    }


def _mean(values: Tensor) -> float | None:
    return round(values.mean().item(), 6) if len(values) else None


@contextmanager
def _apart(job: Job) -> Iterator[None]:
    """The model without dropout and side losses; afterwards task, mode and random state are what they were."""
    device = distributed.device()
    was_training = job.model.training
    with (
        torch.random.fork_rng([] if device.type == "cpu" else [device]),
        job.model.task_kept() if job.has_tasks else nullcontext(),
    ):
        job.model.eval()
        for module in job.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = was_training  # itself alone: it recomputes in training mode only
        try:
            yield
        finally:
            job.model.train(was_training)


def _direction(job: Job, batch: Batch, weights: list[nn.Parameter]) -> Tensor:
    """This rank's part ``[P / ranks]`` of the batch's gradient of all ranks, which as a whole has length one."""
    tensors = {name: tensor.to(distributed.device()) for name, tensor in batch.tensors.items()}
    targets = distributed.sum_over_ranks((tensors["labels"] != -100).sum().float()).clamp(min=1)
    if job.has_tasks:
        job.model.set_task(batch.unit.task)
    loss = job.model(**tensors, num_items_in_batch=targets).loss
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    whole = distributed.sum_over_ranks(torch.cat([gradient.flatten().float() for gradient in gradients]))
    part = whole.tensor_split(distributed.world_size())[distributed.rank()]
    return (part / whole.norm()).cpu()


def _line(step: int, record: dict[str, Any]) -> str:
    between, within = ("unknown" if record[name] is None else f"{record[name]:.3f}" for name in ("between", "within"))
    pairs = len(record["units"]) * (len(record["units"]) - 1) // 2
    below = round((record["negative"] or 0) * pairs)
    return f"gradients at step {step}: cosine {between} between datasets, {within} within; {below} of {pairs} pairs < 0"
