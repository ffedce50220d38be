"""Processes that read ahead."""

from __future__ import annotations

import signal

TO_STOP = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""What asks a run to stop."""


def leave_signals_to_rank(worker: int) -> None:
    """``worker_init_fn`` of a DataLoader: a signal to the whole process group is the rank's to answer, which may want
    to read on until it has saved."""
    for number in TO_STOP:
        signal.signal(number, signal.SIG_IGN)
