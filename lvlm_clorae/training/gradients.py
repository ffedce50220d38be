"""Gradient measurements that do not affect training: conflict between dataset tasks, share of the auxiliary loss.

docs/training.md defines both. With s_u the mean of a dataset task's two gradients, each scaled to length 1, the entries
of the matrix of conflicts are <s_u, s_v>, and 2 |s_u|^2 - 1 on the diagonal. A rank keeps its part of every s_u in main
memory, in fp32. The gradient of the auxiliary loss takes a forward and backward of its own; that of the cross-entropy
is the training step's total minus it.

Gradients are taken by ``torch.autograd.grad`` outside the engine, so DeepSpeed's hooks on ``.grad`` do not run. Random
number generators, sampler, task and mode of the model are restored.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lvlm_clorae.data.collate import Batch
from lvlm_clorae.data.index import DatasetTask
from lvlm_clorae.data.sampler import DatasetTaskPass
from lvlm_clorae.training import distributed
from lvlm_clorae.training.plots import plot_conflicts
from lvlm_clorae.training.preemption import stop_requested
from lvlm_clorae.training.setup import Run, compute_losses

EXPERTS = frozenset({"expert_A", "expert_B"})
NOT_SHARED = EXPERTS | {"mim_scale", "mim_rho", "task_transform", "task_mixture"}
"""Weights of C-LoRAE and MTL-LoRA that are of one task, or that the cross-entropy does not reach."""


@contextmanager
def aux_gradient_share(run: Run, batch: Batch, window: int) -> Iterator[Callable[[], float | None]]:
    """Measure the auxiliary loss's share of the gradient in the micro-step inside the context. Collective.

    It yields a collective function that returns the share after the micro-step, None without a gradient to compare
    with. Methods without task experts are measured on all trained weights. The engine divides the loss by ``window``,
    the number of micro-steps of the optimizer step.
    """
    named = [(name, weight) for name, weight in run.model.named_parameters() if weight.requires_grad]
    weights = [weight for name, weight in named if name.rpartition(".")[2] in EXPERTS] or [w for _, w in named]
    with _forked_rng():
        ce, aux = compute_losses(run, run.model, batch)
        # Under ZeRO-3 the gradient must pass the outputs of all modules: otherwise their weights are not gathered.
        of_aux = torch.autograd.grad(run.config.beta * aux + 0.0 * ce, weights, allow_unused=True)
    del ce, aux
    totals: dict[int, Tensor] = {}

    def keep(index: int, gradient: Tensor) -> None:
        totals[index] = gradient.detach().to(torch.float32, copy=True)  # DeepSpeed reuses the tensor

    def share() -> float | None:
        squares = torch.zeros(2, device=distributed.device())
        for index, total in sorted(totals.items()):  # every weight with a gradient of the auxiliary loss has a total
            own = torch.zeros_like(total) if of_aux[index] is None else of_aux[index].float()
            both = torch.stack([own, window * total - own])
            squares += distributed.sum_over_ranks(both).flatten(1).square().sum(1)
        aux_norm, ce_norm = squares.sqrt().tolist()
        return aux_norm / ce_norm if ce_norm else None

    handles = [weight.register_hook(partial(keep, index)) for index, weight in enumerate(weights)]
    try:
        yield share
    finally:
        for handle in handles:
            handle.remove()


def measure_conflicts(run: Run, metrics: Any, step: int) -> bool:
    """Measure before optimizer step ``step + 1``; write a record and the plot. Collective.

    Returns False if a rank was asked to stop meanwhile; then nothing is written.
    """
    named = run.model.named_parameters()  # the weights that all tasks train, in the model's order
    weights = [weight for name, weight in named if weight.requires_grad and name.rpartition(".")[2] not in NOT_SHARED]
    directions = []
    with evaluation_mode(run):
        for dataset_task in run.dataset_tasks.train.values():
            if distributed.any_rank(stop_requested()):
                return False
            first, second = (_direction(run, batch, weights) for batch in probe_batches(run, dataset_task, step))
            directions.append((first + second) / 2)
            run.status.heartbeat()
    record = summary(list(run.dataset_tasks.train), cosines(directions))
    metrics.write(step, "conflicts", **record)
    distributed.on_first_rank(lambda: plot_conflicts(run.directory))
    run.report.say(_line(step, record))
    return True


def probe_batches(run: Run, dataset_task: DatasetTask, step: int) -> Iterator[Batch]:
    """Yield this rank's part of the dataset task's two batches, without common samples if there are enough."""
    config, collator = run.config, run.collator("train")
    size = config.per_device_train_batch_size * distributed.world_size()
    shard_sizes = [shard.samples for shard in run.dataset.shards(dataset_task.dataset)]
    order = DatasetTaskPass(dataset_task.name, shard_sizes, 2 * size, config.seed, f"conflicts at {step}")
    first = distributed.rank() * config.per_device_train_batch_size
    for half in range(2):  # alternating partitions, so that both batches come from all shards
        refs = [order.sample_ref(0, 2 * row + half) for row in range(first, first + config.per_device_train_batch_size)]
        yield collator(run.dataset.__getitems__(refs))


def cosines(directions: Sequence[Tensor]) -> Tensor:
    """Return the matrix ``[U, U]`` on the CPU from this rank's parts of s_u ``[P / ranks]``. Collective.

    It is NaN where a gradient is zero or not finite.
    """
    own = [torch.stack([first @ second for second in directions]) for first in directions]
    products = distributed.sum_over_ranks(torch.stack(own).to(distributed.device())).cpu()
    products.diagonal().mul_(2).sub_(1)
    return products


def summary(dataset_tasks: list[str], matrix: Tensor) -> dict[str, Any]:
    """Return the record: mean cosine between and within dataset tasks, share of negative pairs, names, matrix.

    Values that are undefined, such as ``between`` for a single dataset task, are None.
    """
    pairs = matrix[torch.triu(torch.ones_like(matrix, dtype=torch.bool), diagonal=1)]
    pairs, within = (values[~values.isnan()] for values in (pairs, matrix.diagonal()))
    return {
        "between": _mean(pairs),
        "within": _mean(within),
        "negative": _mean((pairs < 0).float()),
        "dataset_tasks": dataset_tasks,
        "matrix": [[None if value != value else round(value, 6) for value in row] for row in matrix.tolist()],
    }


def _mean(values: Tensor) -> float | None:
    return round(values.mean().item(), 6) if len(values) else None


def _forked_rng() -> Any:
    device = distributed.device()
    return torch.random.fork_rng([] if device.type == "cpu" else [device])


@contextmanager
def evaluation_mode(run: Run) -> Iterator[None]:
    """Context without dropout and auxiliary losses that restores task, mode and random number generators."""
    was_training = run.model.training
    with _forked_rng(), run.model.task_kept() if run.has_tasks else nullcontext():
        run.model.eval()
        for module in run.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = was_training  # not its submodules: it recomputes in training mode only
        try:
            yield
        finally:
            run.model.train(was_training)


def _direction(run: Run, batch: Batch, weights: list[nn.Parameter]) -> Tensor:
    """Return this rank's part ``[P / ranks]`` of the gradient over all ranks, scaled to length 1 as a whole."""
    ce, _ = compute_losses(run, run.model, batch)
    gradients = torch.autograd.grad(ce, weights, allow_unused=True, materialize_grads=True)
    whole = distributed.sum_over_ranks(torch.cat([gradient.flatten().float() for gradient in gradients]))
    part = whole.tensor_split(distributed.world_size())[distributed.rank()]
    return (part / whole.norm()).cpu()


def _line(step: int, record: dict[str, Any]) -> str:
    between, within = ("undefined" if record[name] is None else f"{record[name]:.3f}" for name in ("between", "within"))
    pairs = len(record["dataset_tasks"]) * (len(record["dataset_tasks"]) - 1) // 2
    below = round((record["negative"] or 0) * pairs)
    return f"gradients at step {step}: cosine {between} between datasets, {within} within; {below} of {pairs} pairs < 0"
