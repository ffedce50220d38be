"""Generators of computed tables, which only the documentation needs; run them as ``python -m tools.NAME``."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lvlm_clorae.errors import UserError

TASKS = ["mner", "mre", "mee"]


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with a line and exit code 2 for a mistake that the user can fix."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
