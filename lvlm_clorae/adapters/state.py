"""Checks of what an adapter's files say, before it is loaded: names of weights, patterns of module names."""

import time
from collections.abc import Iterable
from typing import Any

import regex

PATTERN_SECONDS = 2.0
"""Time for matching a pattern with all module names; a thousand names take milliseconds."""


def resolve_patterns(config: Any, names: Iterable[str]) -> None:
    """Replace regular expressions in an adapter's configuration by the module names that they match.

    ``re``, by which PEFT matches, cannot be stopped, and some patterns take it years.

    Raises:
        ValueError: a pattern is invalid or takes too long
    """
    found = list(names)
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field, None)
        if not isinstance(pattern, str) or (field == "target_modules" and pattern.lower() == "all-linear"):
            continue
        until = time.monotonic() + PATTERN_SECONDS
        try:
            matches = regex.compile(pattern).fullmatch
            matched = [name for name in found if matches(name, timeout=max(1e-3, until - time.monotonic()))]
        except (regex.error, TimeoutError, RecursionError, MemoryError, OverflowError) as error:
            raise ValueError(
                f"{field}: the regular expression {pattern[:60]!r} is invalid or takes too long "
                f"({type(error).__name__}). List the names of the modules."
            ) from None
        setattr(config, field, matched)


def check_weights(found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise ValueError, with numbers and examples, unless two collections of weight names are equal."""
    there, wanted = set(found), set(expected)
    problems = []
    for what, names in (("missing", wanted - there), ("unknown", there - wanted)):
        if names:
            problems.append(f"{len(names)} {what}, such as {', '.join(sorted(names)[:3])}")
    if problems:
        raise ValueError(f"of {len(wanted)} weights of the adapter, the file has {'; '.join(problems)}")
