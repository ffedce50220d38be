"""The collate function: decode images, build prompts and targets, and make the model's tensors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lvlm_clorae.data.dataset import Sample
from lvlm_clorae.data.images import InvalidImage, decode_image
from lvlm_clorae.data.index import DatasetTask
from lvlm_clorae.data.reader import InvalidSample
from lvlm_clorae.tasks import build_prompt, format_answer
from lvlm_clorae.tasks.schema import missing_annotations

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_clorae.models.processor import Processor

IGNORE_INDEX = -100
SHARED_MEMORY_BYTES = 1 << 16
"""Tensors from this size on go from a worker to its parent in shared memory."""


@dataclass(frozen=True)
class Batch:
    """Samples, in training all of one dataset task, and the model's tensors for them; lists have an item per row."""

    dataset_tasks: list[DatasetTask]
    keys: list[str]
    samples: list[dict[str, Any]]
    prompts: list[str]
    is_padding: list[bool]
    """Rows that only fill the batch."""
    ignored: list[bool]
    """Rows that are neither trained on nor scored; their ``labels`` are all -100."""
    tensors: dict[str, torch.Tensor]
    invalid: list[str] = field(default_factory=list)
    """Messages of samples that were skipped, or whose image was left out."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle small tensors as arrays: a tensor costs a file of shared memory between worker and parent."""
        small = {name: value.numpy() for name, value in self.tensors.items() if value.nbytes < SHARED_MEMORY_BYTES}
        return {**vars(self), "tensors": {**self.tensors, **small}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: torch.as_tensor(value) for name, value in state["tensors"].items()}
        vars(self).update(state, tensors=tensors)

    @property
    def dataset_task(self) -> DatasetTask:
        """The dataset task of all rows, in training."""
        names = {dataset_task.name for dataset_task in self.dataset_tasks}
        if len(names) > 1:
            raise ValueError(f"the batch has rows of several dataset tasks: {', '.join(sorted(names))}")
        return self.dataset_tasks[0]

    @property
    def counted(self) -> list[bool]:
        """Rows whose answers are scored in evaluation."""
        return [not (is_padding or ignored) for is_padding, ignored in zip(self.is_padding, self.ignored, strict=True)]


_Row = tuple[str, "Image.Image | None", "list[list[float]]", str]
"""The processor's arguments for one sample: prompt, image, boxes and target."""
_EMPTY_ROW: _Row = ("", None, [], "")


@dataclass(frozen=True)
class Collator:
    """Make a batch of samples.

    Args:
        dataset_tasks: the dataset tasks that samples may be of, by name
        max_source_length, max_target_length: tokens of a prompt, of a target
        on_invalid_sample: how to handle an invalid sample. ``error``: raise InvalidSample. ``blank``: treat an image
            that cannot be decoded as missing, and handle other faults as ``skip``. ``skip``: keep the row, so that the
            batches of all ranks stay alike, and ignore it.
        use_images: False treats every image as missing
        with_labels: False leaves out ``labels``, for generation
    """

    processor: Processor
    dataset_tasks: Mapping[str, DatasetTask]
    max_source_length: int = 256
    max_target_length: int = 128
    on_invalid_sample: str = "error"
    use_images: bool = True
    with_labels: bool = True

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Make the batch, one row per sample. Raises InvalidSample under the policy ``error``, UserError otherwise."""
        invalid: list[str] = []
        found = [self._row(sample, invalid) for sample in samples]
        ignored = [row is None or sample.ref.is_consumed for row, sample in zip(found, samples, strict=True)]
        prompts, images, boxes, targets = map(list, zip(*(row or _EMPTY_ROW for row in found), strict=True))
        limits = {"max_source_length": self.max_source_length, "max_target_length": self.max_target_length}
        tensors = self.processor(prompts, images, boxes, targets if self.with_labels else None, **limits)
        if self.with_labels and any(ignored):
            tensors["labels"][torch.tensor(ignored)] = IGNORE_INDEX
        return Batch(
            dataset_tasks=[self.dataset_tasks[sample.ref.dataset_task] for sample in samples],
            keys=[sample.key if row else "" for row, sample in zip(found, samples, strict=True)],
            samples=[sample.data if row else {} for row, sample in zip(found, samples, strict=True)],
            prompts=prompts,
            is_padding=[sample.ref.is_padding for sample in samples],
            ignored=ignored,
            tensors=tensors,
            invalid=invalid,
        )

    def _row(self, sample: Sample, invalid: list[str]) -> _Row | None:
        """Build the row of a sample; None if it is skipped. Adds a message to ``invalid`` if anything is left out."""
        dataset_task, where = self.dataset_tasks[sample.ref.dataset_task], f"{sample.shard}, {sample.key}"
        image = None
        try:
            if sample.error:
                raise sample.error
            if missing := missing_annotations(sample.data, [dataset_task.subtask]):
                raise InvalidSample(f"{where}: has no {missing[0]} for {dataset_task.name}. Rebuild the shard.")
            if self.use_images and sample.image is not None:
                image = decode_image(sample.image, where)
        except InvalidSample as error:
            if self.on_invalid_sample == "error":
                raise
            invalid.append(str(error))
            if self.on_invalid_sample == "skip" or not isinstance(error, InvalidImage):
                return None
        prompt = build_prompt(sample.data, dataset_task.subtask, dataset_task.labels)
        boxes = [item["box"] for item in sample.data.get("objects") or ()]
        return prompt, image, boxes, format_answer(sample.data, dataset_task.subtask)
