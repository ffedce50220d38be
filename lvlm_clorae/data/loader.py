"""The DataLoader of training and evaluation."""

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from lvlm_clorae.data.collate import Batch
from lvlm_clorae.data.dataset import Sample, ShardDataset
from lvlm_clorae.data.sampler import DistributedTaskBatchSampler, SampleRef
from lvlm_clorae.errors import UserError

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
MAX_WARNINGS = 5
"""Warnings of invalid samples before only every power of two is reported."""
logger = logging.getLogger(__name__)
CollateFunction = Callable[[Sequence[Sample]], Batch]


class ShardDataLoader(DataLoader[Any]):
    """A DataLoader that raises errors of workers without traceback, reports invalid samples and advances the sampler.

    The order of batches does not depend on the number of workers, and no random number of the process is used.

    Args:
        batch_sampler: gives the locations of each batch; that of training is advanced with every batch
        collate_fn: makes the batch, see :class:`~lvlm_clorae.data.collate.Collator`
    """

    def __init__(
        self,
        dataset: ShardDataset,
        batch_sampler: Iterable[list[SampleRef]],
        collate_fn: CollateFunction,
        num_workers: int = 0,
    ) -> None:
        # With a generator of its own the loader leaves the random state to dropout.
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=partial(_batch_or_error, collate_fn),
            num_workers=num_workers,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),
        )
        self.invalid_samples = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield batches, each counted as consumed; raise the UserError of a worker."""
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            for message in batch.invalid:
                self.invalid_samples += 1
                if self.invalid_samples <= MAX_WARNINGS or self.invalid_samples.bit_count() == 1:
                    logger.warning("invalid sample %d: %s", self.invalid_samples, message)
            if isinstance(self.batch_sampler, DistributedTaskBatchSampler):
                self.batch_sampler.advance()
            yield batch


def _batch_or_error(collate_fn: CollateFunction, samples: Sequence[Sample]) -> Batch | UserError:
    """Return a UserError in place of the batch: a DataLoader would put the traceback into its message."""
    try:
        return collate_fn(samples)
    except UserError as error:
        return error


def ignore_stop_signals(worker_id: int) -> None:
    """Ignore in a worker the signals that stop a run: the rank answers them, and may read on until it has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
