"""The DataLoader of training and evaluation."""

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial
from threading import current_thread, main_thread
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from lvlm_clorae.data.collate import Batch
from lvlm_clorae.data.dataset import Sample, ShardDataset
from lvlm_clorae.data.sampler import DistributedTaskBatchSampler, SampleRef
from lvlm_clorae.data.storage import run_in_daemon
from lvlm_clorae.errors import UserError, first_line

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
MAX_WARNINGS = 5
"""Warnings of invalid samples before only every power of two is reported."""
WINDOW = 1000
"""A run ends if more than half of this many last samples were invalid."""
PATIENCE = 5.0
"""Seconds without a batch after which ``while_waiting`` is called."""
logger = logging.getLogger(__name__)
CollateFunction = Callable[[Sequence[Sample]], Batch]


class ShardDataLoader(DataLoader[Any]):
    """A DataLoader that raises errors of workers without traceback, reports invalid samples and advances the sampler.

    The order of batches does not depend on the number of workers, and no random number of the process is used.

    Args:
        batch_sampler: gives the locations of each batch; that of training is advanced with every batch
        collate_fn: makes the batch, see :class:`~lvlm_clorae.data.collate.Collator`
        timeout: seconds without a batch of the workers after which iteration ends with an error
        while_waiting: called about twice a second when no batch has come for ``PATIENCE``; it may raise

    Raises:
        UserError: in iteration, if a worker raised one, ended or did not answer, or too many samples were invalid.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        batch_sampler: Iterable[list[SampleRef]],
        collate_fn: CollateFunction,
        num_workers: int = 0,
        timeout: float = 600.0,
        while_waiting: Callable[[], None] = lambda: None,
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
        self.invalid_samples = self.truncated_samples = 0
        self._invalid: deque[bool] = deque(maxlen=WINDOW)
        self._seconds, self._while_waiting = timeout, while_waiting

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield batches, each counted as consumed."""
        batches = super().__iter__()
        if self.num_workers and current_thread() is main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises anywhere; _next notices as well
        try:
            while (batch := self._next(batches)) is not None:
                if isinstance(batch, UserError):
                    raise batch
                self._count_invalid(batch)
                if isinstance(self.batch_sampler, DistributedTaskBatchSampler):
                    self.batch_sampler.advance()
                yield batch
        finally:
            if self.num_workers:
                _kill(batches)

    def _next(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, None at the end; of workers with a deadline, in a thread that can be left behind."""
        if not self.num_workers:
            return next(batches, None)
        start, pids = time.monotonic(), ", ".join(str(worker.pid) for worker in batches._workers)  # type: ignore[attr-defined]
        problem = ""
        try:
            future = run_in_daemon(lambda: next(batches, None))
            while not wait([future], 0.5).done and not problem:
                waited = time.monotonic() - start
                if waited > self._seconds:
                    problem = f"do not answer for {waited:.0f} s. They may wait for the storage of the shards."
                elif waited > PATIENCE:
                    self._while_waiting()
            if not problem:
                return future.result()
        except BaseException as error:
            if "DataLoader worker (pid" not in str(error):  # torch's message, raised here or in the thread
                _kill(batches)
                raise
            problem = f"ended: {first_line(error)} They may have been killed for lack of memory."
        _kill(batches)
        raise UserError(f"The DataLoader workers (processes {pids}) {problem} Lower --dataloader_num_workers?")

    def _count_invalid(self, batch: Batch) -> None:
        """Log the invalid samples of a batch. Raises UserError if most of the last ``WINDOW`` samples were invalid."""
        rows = len(batch.is_padding) - sum(batch.is_padding)
        self._invalid.extend(number < len(batch.invalid) for number in range(rows))
        self.invalid_samples = _warn("invalid sample", self.invalid_samples, batch.invalid)
        self.truncated_samples = _warn("sample too long", self.truncated_samples, batch.truncated)
        if sum(self._invalid) > WINDOW / 2:
            raise UserError(
                f"{sum(self._invalid)} of the last {len(self._invalid)} samples were invalid, the last one: "
                f"{batch.invalid[-1]} Check the shards with: lvlm-clorae shards verify"
            )


def _kill(batches: Any) -> None:
    """End the workers, if they run: the end of the process would wait for them forever, since they ignore SIGTERM.

    torch's own shutdown is then left out. It takes a lock, which a killed worker may have held.
    """
    if batches._shutdown:
        return
    batches._shutdown = True
    if batches._worker_pids_set:
        signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False
    for queue in (*batches._index_queues, batches._worker_result_queue):
        queue.cancel_join_thread()
    for worker in batches._workers:
        worker.kill()


def _warn(what: str, count: int, messages: Iterable[str]) -> int:
    """Log the messages less and less often, and return the new count."""
    for number, message in enumerate(messages, count + 1):
        count = number
        if number <= MAX_WARNINGS or number.bit_count() == 1:
            logger.warning("%s %d: %s", what, number, message)
    return count


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
