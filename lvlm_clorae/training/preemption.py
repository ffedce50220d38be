"""Graceful preemption: finish the step, save, exit with code 75.

SIGUSR1, SIGTERM and the first Ctrl-C set a flag that all ranks check after every step. This module does not import
torch, so that a process handles signals before it is loaded.
"""

import faulthandler
import signal
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run was interrupted and saved, and can be resumed."""
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""Workers of a DataLoader ignore them (:mod:`lvlm_clorae.data.loader`)."""
_stop_requested = False


class Interrupted(Exception):
    """All ranks agreed to stop and the state is saved. The message says how far the run got."""


def listen() -> None:
    """Install the signal handlers. SIGUSR2 prints the stack of every thread, to debug a run that hangs."""
    for number in STOP_SIGNALS:
        signal.signal(number, _request_stop)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def stop_while_waiting() -> None:
    """Raise Interrupted if this rank has received a signal to stop: other ranks may be in a collective."""
    if _stop_requested:
        raise Interrupted("it waited for data; what it did since its last checkpoint will be repeated")


def stop_requested() -> bool:
    """Return True if this rank has received a signal to stop."""
    return _stop_requested


def _request_stop(number: int, frame: FrameType | None) -> None:
    global _stop_requested
    _stop_requested = True
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops the process at once
