"""Comparison of an adapter's weights with those of a file, before they are loaded."""

from collections.abc import Iterable


def check_weights(found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise ValueError, with numbers and examples, unless two collections of weight names are equal."""
    there, wanted = set(found), set(expected)
    problems = []
    for what, names in (("missing", wanted - there), ("unknown", there - wanted)):
        if names:
            problems.append(f"{len(names)} {what}, such as {', '.join(sorted(names)[:3])}")
    if problems:
        raise ValueError(f"of {len(wanted)} weights of the adapter, the file has {'; '.join(problems)}")
