"""The one exception that is the user's to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the user's input, configuration or machine is wrong.

    The message says what is wrong, why, and what to do. Commands print it without a traceback and exit with code 2.
    """

    exit_code = 2
    everywhere = False
    """Whether all ranks of a run raise it alike, so that one of them tells it."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """``' Did you mean "clorae"?'``, or every valid name when none is near. For the end of an error message."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Valid: {', '.join(names)}." if names else ""
