"""The exception for mistakes that the user can fix."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An error in the user's input, configuration or environment.

    The message says what is wrong and what to do. Commands print it without a traceback and exit with code 2.
    """

    exit_code = 2
    everywhere = False
    """True if all ranks of a run raise the same error, so that only rank 0 prints it."""


@contextmanager
def located(where: object) -> Iterator[None]:
    """Add a location, such as a file, to the UserErrors of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``' Did you mean "clorae"?'``, or all valid names if none is similar, for the end of an error message."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Valid: {', '.join(names)}." if names else ""


def first_line(error: object) -> str:
    """Return the first line of a text or an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
