"""A wish to stop. SIGUSR1, SIGTERM and the first Ctrl-C set a flag; the ranks agree on it, save, and exit with 75.

Imports nothing slow, so that a job listens before it loads torch.
"""

from __future__ import annotations

import faulthandler
import signal
from types import FrameType

from lvlm_clorae.data.workers import TO_STOP

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: interrupted and saved; the same command with --resume auto goes on."""
_wished = False


class Interrupted(Exception):
    """All ranks have agreed to stop, and what is needed to go on is saved. The message says how far the run came."""


def listen() -> None:
    """Take the signals from now on. SIGUSR2 prints where every thread is, for a job that seems to hang."""
    for number in TO_STOP:
        signal.signal(number, _wish)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def wished() -> bool:
    """Whether this rank was told to stop."""
    return _wished


def _wish(number: int, frame: FrameType | None) -> None:
    global _wished
    _wished = True
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends the job at once
