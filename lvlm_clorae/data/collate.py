"""The collate function: decode images, build prompts and targets, and make the model's tensors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lvlm_clorae.data.dataset import Sample
from lvlm_clorae.data.images import InvalidImage, load_image
from lvlm_clorae.data.index import INDEX_NAME, DatasetTask
from lvlm_clorae.data.reader import InvalidSample
from lvlm_clorae.errors import UserError, first_line
from lvlm_clorae.tasks import fit_prompt, format_answer, visible
from lvlm_clorae.tasks.prompt import PromptTooLong
from lvlm_clorae.tasks.schema import missing_annotations, unknown_labels

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_clorae.models.processor import Processor

IGNORE_INDEX = -100
SHARED_MEMORY_BYTES = 1 << 16
"""Tensors from this size on go from a worker to its parent in shared memory."""


@dataclass(frozen=True)
class Batch:
    """Samples of one dataset task, and the model's tensors for them; lists have an item per row."""

    dataset_task: DatasetTask
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
    truncated: list[str] = field(default_factory=list)
    """Messages of samples whose prompt or target was too long."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle small tensors as arrays: a tensor costs a file of shared memory between worker and parent."""
        small = {name: value.numpy() for name, value in self.tensors.items() if value.nbytes < SHARED_MEMORY_BYTES}
        return {**vars(self), "tensors": {**self.tensors, **small}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: torch.as_tensor(value) for name, value in state["tensors"].items()}
        vars(self).update(state, tensors=tensors)

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
        on_truncation: how to handle a sample beyond the limits. ``cut``: cut the text of the prompt, leave gold that is
            no longer in it out of the target, and give a target that is cut no end-of-sequence token. ``skip``: ignore
            the row. ``error``: raise UserError. Without labels always ``cut``.
        use_images: False treats every image as missing
        with_labels: False leaves out ``labels``, for generation
    """

    processor: Processor
    dataset_tasks: Mapping[str, DatasetTask]
    max_source_length: int = 512
    max_target_length: int = 128
    on_invalid_sample: str = "error"
    on_truncation: str = "cut"
    use_images: bool = True
    with_labels: bool = True

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Make the batch, one row per sample. Raises InvalidSample under the policy ``error``, UserError otherwise.

        Raises ValueError if the samples are of several dataset tasks.
        """
        names = sorted({sample.ref.dataset_task for sample in samples})
        if len(names) != 1:
            raise ValueError(f"the samples of a batch must be of one dataset task, not {', '.join(names)}")
        invalid: list[str] = []
        truncated: list[str] = []
        found = [self._row(sample, invalid, truncated) for sample in samples]
        try:
            tensors = self._tensors(found)
        except UserError:
            raise
        except Exception:  # of the model's own processor: find the rows that it cannot process
            checked = [
                row and self._row(sample, invalid, truncated, row) for sample, row in zip(samples, found, strict=True)
            ]
            if all(row is before for row, before in zip(checked, found, strict=True)):
                raise
            found, tensors = checked, self._tensors(checked)
        if self.with_labels:
            self._check_targets(samples, found, tensors["labels"], truncated)
        ignored = [row is None or sample.ref.is_consumed for row, sample in zip(found, samples, strict=True)]
        if self.with_labels and any(ignored):
            tensors["labels"][torch.tensor(ignored)] = IGNORE_INDEX
        return Batch(
            dataset_task=self.dataset_tasks[names[0]],
            keys=[sample.key if row else "" for row, sample in zip(found, samples, strict=True)],
            samples=[sample.data if row else {} for row, sample in zip(found, samples, strict=True)],
            prompts=[row[0] if row else "" for row in found],
            is_padding=[sample.ref.is_padding for sample in samples],
            ignored=ignored,
            tensors=tensors,
            invalid=invalid,
            truncated=truncated,
        )

    def _check_targets(
        self, samples: Sequence[Sample], rows: list[_Row | None], labels: torch.Tensor, truncated: list[str]
    ) -> None:
        """Handle targets without an end-of-sequence token, which are cut, in place."""
        cut = (labels != IGNORE_INDEX).any(1) & ~(labels == self.processor.eos_token_id).any(1)
        for number in cut.nonzero().flatten().tolist() if cut.any() else ():
            sample = samples[number]
            message = f"{sample.shard}, {sample.key}: its target is cut to {self.max_target_length} tokens"
            if rows[number] and not self._is_kept(message, truncated):
                rows[number] = None

    def _is_kept(self, message: str, truncated: list[str]) -> bool:
        """Return whether a sample beyond the limits is used, and add the message. Raises UserError."""
        if not self.with_labels or self.on_truncation == "cut":
            truncated.append(message)
            return True
        if self.on_truncation == "error":
            raise UserError(f"{message}. Raise the limit, or set --on_truncation.")
        truncated.append(f"{message}; it is skipped")
        return False

    def _fits(self, prompt: str) -> bool:
        # An ASCII character is at most one token, beside those for the beginning and the end.
        if prompt.isascii() and len(prompt) + 2 <= self.max_source_length:
            return True
        return self.processor.prompt_tokens(prompt) <= self.max_source_length

    def _tensors(self, rows: Sequence[_Row | None]) -> dict[str, torch.Tensor]:
        prompts, images, boxes, targets = map(list, zip(*(row or _EMPTY_ROW for row in rows), strict=True))
        lengths = self.max_source_length, self.max_target_length
        return self.processor.encode(prompts, images, boxes, targets if self.with_labels else None, lengths)

    def _row(
        self, sample: Sample, invalid: list[str], truncated: list[str], processed: _Row | None = None
    ) -> _Row | None:
        """Build the row of a sample, or let the processor process it; None if it is skipped.

        Adds messages to ``invalid`` and ``truncated`` if anything is left out.
        """
        where = f"{sample.shard}, {sample.key}"
        try:
            try:
                if processed is None:
                    return self._prepare(sample, where, truncated, self.use_images)
                self._tensors([processed])
                return processed
            except UserError:
                raise
            except Exception as error:
                fault = InvalidSample if processed is None else InvalidImage
                raise fault(f"{where}: cannot be prepared ({type(error).__name__}: {first_line(error)}).") from error
        except InvalidSample as error:
            if self.on_invalid_sample == "error":
                raise
            invalid.append(str(error))
            if self.on_invalid_sample == "blank" and isinstance(error, InvalidImage):
                return self._prepare(sample, where, truncated, use_images=False)
            return None

    def _prepare(self, sample: Sample, where: str, truncated: list[str], use_images: bool) -> _Row | None:
        if sample.error:
            raise sample.error
        dataset_task, data = self.dataset_tasks[sample.ref.dataset_task], sample.data
        if missing := missing_annotations(data, [dataset_task.subtask]):
            raise InvalidSample(f"{where}: has no {missing[0]} for {dataset_task.name}. Rebuild the shard.")
        if unknown := unknown_labels(data, {dataset_task.subtask: dataset_task.labels}):
            raise InvalidSample(
                f"{where}: its label {unknown[0]} is not among those of {INDEX_NAME}. Rebuild the shards."
            )
        boxes = [item["box"] for item in data.get("objects") or ()]
        try:
            reads_images = self.processor.reads_images
            prompt, read = fit_prompt(data, dataset_task.subtask, dataset_task.labels, self._fits, reads_images)
        except PromptTooLong as error:
            raise InvalidSample(f"{where}: {error}") from None
        if read < len(data["tokens"]):
            message = f"{where}: only {read} of {len(data['tokens'])} words are in its {dataset_task.subtask} prompt"
            if not self._is_kept(message, truncated):
                return None
        target = format_answer(visible(data, read), dataset_task.subtask)
        if not reads_images:
            return prompt, None, [], target
        if not use_images or sample.image is None:
            return prompt, None, boxes, target
        loaded = load_image(sample.image, f"{where}: its image")
        return prompt, loaded.image, loaded.scaled(boxes), target
