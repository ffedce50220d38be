"""The end of an alignment: the loss of held-out captions with their own and with other images, and the base itself.

An aligned projector makes the loss of a caption lower with its own image than with another. The difference is averaged
over the captions of an image, and its standard error is that over images, since captions of one image are not
independent.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lvlm_clorae.data.collate import IGNORE_INDEX, Batch
from lvlm_clorae.data.dataset import Sample, ShardDataset
from lvlm_clorae.data.index import DatasetTask
from lvlm_clorae.data.loader import ShardDataLoader
from lvlm_clorae.data.sampler import SampleRef, evaluation_batches
from lvlm_clorae.files import replace_directory, write_text_atomic
from lvlm_clorae.models.presets import ALIGNED
from lvlm_clorae.training import distributed
from lvlm_clorae.training.preemption import Interrupted, stop_requested, stop_while_waiting
from lvlm_clorae.training.run_directory import Metrics
from lvlm_clorae.training.setup import Run

MAX_CAPTIONS = 1000
"""Captions of a dataset that are measured, the first ones of its held-out split."""

_Losses = dict[str, tuple[str, float]]
"""Key of a sample -> name of the image that was shown, and loss of the caption."""


@dataclass(frozen=True)
class CaptionLoss:
    """Cross-entropy of captions [nats per token]: mean with the own and with another image, and their difference."""

    captions: int
    images: int
    own: float
    other: float
    difference: float
    standard_error: float
    """Of the difference, over images."""


def export_base(run: Run) -> None:
    """Write ``caption_loss.json`` and ``base/``, a whole model for ``--model``. Collective."""
    split = "test" if run.dataset_tasks.test else "dev"
    found = {
        task.name: loss for task in getattr(run.dataset_tasks, split).values() if (loss := measure(run, split, task))
    }
    for name, loss in found.items():
        run.report.say(
            f"{name}, {split}: loss {loss.own:.4f} with the own image, {loss.other:.4f} with another; difference "
            f"{loss.difference:.4f}, standard error {loss.standard_error:.4f} ({loss.captions} captions of "
            f"{loss.images} images)"
        )
    if found and distributed.rank() == 0:
        rows = {name: asdict(loss) for name, loss in found.items()}
        columns = {
            column: {name: row[column] for name, row in rows.items()} for column in asdict(next(iter(found.values())))
        }
        metrics = Metrics(run.directory, run.status.progress["step"])
        metrics.write(run.status.progress["step"], "caption_loss", **columns)
        metrics.close()
        content = {"split": split, "dataset_tasks": rows}
        write_text_atomic(run.directory / "caption_loss.json", json.dumps(content, indent=1) + "\n")
    state = distributed.gathered_state(run.model, trainable_only=False)

    def write(path: Path) -> None:
        run.model.save_pretrained(path, state_dict=state)
        run.processor.save_pretrained(path)

    distributed.on_first_rank(lambda: replace_directory(run.directory / ALIGNED, write))


def measure(run: Run, split: str, task: DatasetTask) -> CaptionLoss | None:
    """Measure the captions of a dataset task; None for fewer than two images. Collective.

    Raises:
        UserError: a shard cannot be read, or a sample is invalid and the collator's policy is ``error``.
        Interrupted: on every rank, if one of them was asked to stop.
    """
    datasets = [made(run.dataset.index, run.dataset.storages, split) for made in (ShardDataset, _OtherImages)]
    for dataset in datasets:
        dataset.limit = MAX_CAPTIONS
    own, other = (_losses(run, dataset, task) for dataset in datasets)
    return distributed.on_first_rank(lambda: compare(own, other))


def compare(own: Mapping[str, tuple[str, float]], other: Mapping[str, tuple[str, float]]) -> CaptionLoss | None:
    """Compare the losses by key with the own and another image; None for fewer than two images.

    Captions whose other image is their own are left out.
    """
    pairs: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for key in own.keys() & other.keys():
        (image, loss), (shown, other_loss) = own[key], other[key]
        if image != shown:
            pairs[image].append((loss, other_loss))
    if len(pairs) < 2:
        return None
    means = [tuple(map(mean, zip(*pairs[image], strict=True))) for image in sorted(pairs)]
    differences = [other - own for own, other in means]
    error = stdev(differences) / len(differences) ** 0.5
    own_mean, other_mean = map(mean, zip(*means, strict=True))
    return CaptionLoss(sum(map(len, pairs.values())), len(pairs), own_mean, other_mean, mean(differences), error)


class _OtherImages(ShardDataset):
    """The captions of a dataset, each with the image of the caption that is half the split away."""

    def __getitems__(self, refs: Sequence[SampleRef]) -> list[Sample]:
        """Read the captions ``refs`` of one dataset task."""
        every = self.refs(refs[0].dataset_task)
        numbers = {(ref.shard, ref.sample): number for number, ref in enumerate(every)}
        away = [every[(numbers[ref.shard, ref.sample] + len(every) // 2) % len(every)] for ref in refs]
        found, others = super().__getitems__(refs), super().__getitems__(away)
        return [_with_image(own, other) for own, other in zip(found, others, strict=True)]


def _with_image(own: Sample, other: Sample) -> Sample:
    data = {**own.data, "image": other.data.get("image")}
    return replace(own, image=other.image, data=data, error=own.error or other.error)


@torch.no_grad()
def _losses(run: Run, dataset: ShardDataset, task: DatasetTask) -> _Losses:
    """Return the loss of each caption on rank 0. Collective."""
    config, ranks = run.config, (distributed.rank(), distributed.world_size())
    equal = {task.dataset: [0] * len(dataset.refs(task.name))}
    batches = evaluation_batches(dataset, [task], equal, config.per_device_eval_batch_size, *ranks)
    workers, collator = config.dataloader_num_workers, run.collator(dataset.split)
    found: list[tuple[str, tuple[str, float]]] = []
    run.report.begin(f"captions of {dataset.split}", sum(map(len, batches)))
    run.model.eval()
    for batch in ShardDataLoader(dataset, batches, collator, workers, while_waiting=stop_while_waiting):
        losses = _row_losses(run.model, batch)
        rows = zip(batch.keys, batch.samples, losses, batch.counted, strict=True)
        found += [(key, (sample["image"], loss)) for key, sample, loss, counted in rows if counted]
        run.advance(len(losses))
        if distributed.any_rank(stop_requested()):
            raise Interrupted("in the evaluation, which will be repeated")
    return dict(distributed.gathered(found) or ())


def _row_losses(model: Any, batch: Batch) -> list[float]:
    """Compute the mean cross-entropy of the tokens of each row's answer."""
    tensors = {name: tensor.to(distributed.device()) for name, tensor in batch.tensors.items()}
    logits = model(**tensors).logits.float()
    labels = tensors["labels"][:, -logits.shape[1] :]
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none").sum(1)
    return (losses / (labels != IGNORE_INDEX).sum(1).clamp(min=1)).tolist()
