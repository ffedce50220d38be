"""Losses on parts of dev during training, from which CoBa computes its weights."""

import torch

from lvlm_clorae.data.sampler import DatasetTaskPass
from lvlm_clorae.training import distributed
from lvlm_clorae.training.gradients import evaluation_mode
from lvlm_clorae.training.setup import Run, compute_losses


@torch.no_grad()
def dev_losses(run: Run, number: int) -> dict[str, float]:
    """Return the cross-entropy of each trained dataset task on part ``number`` of its dev split. Collective.

    A part has as many samples as a micro-step of all ranks. The parts of a dev split are in a fixed order and start
    again at its end, so they depend on ``number`` alone. The loss is the mean over the target tokens of all ranks.
    Training is not changed: dropout is off, and the random number generators are restored.
    """
    dataset, collator = run.dataset.of_split("dev"), run.collator("dev")
    rows, ranks = run.config.per_device_train_batch_size, distributed.world_size()
    first, losses = distributed.rank() * rows, {}
    with evaluation_mode(run):
        for name, task in run.dataset_tasks.dev.items():
            if name in run.dataset_tasks.train:
                sizes = [shard.samples for shard in dataset.shards(task.dataset)]
                order = DatasetTaskPass(name, sizes, rows * ranks, run.config.seed, "dev losses")
                refs = [order.sample_ref(number % order.steps, first + row) for row in range(rows)]
                losses[name], _ = compute_losses(run, run.model, collator(dataset.__getitems__(refs)))
    run.status.heartbeat()
    means = distributed.sum_over_ranks(torch.stack(list(losses.values())).float()) / ranks
    return dict(zip(losses, means.tolist(), strict=True))
