"""Console for tables. A file or pipe has no width of its own, so it gets a fixed width."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def make_console(width: int = 120, **settings: Any) -> Console:
    """Return a rich console on standard output; rich is imported here, since ``--help`` does not need it."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, highlight=False, **settings)
