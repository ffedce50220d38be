"""Run sub-commands of ``lvlm-clorae`` in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lvlm_clorae import cli

Run = Callable[..., "tuple[str, str]"]


def runner(capsys: pytest.CaptureFixture[str], command: str) -> Run:
    """Return a function that runs ``command`` with arguments, checks its exit code, and returns stdout and stderr."""

    def run(*argv: object, code: int = 0) -> tuple[str, str]:
        assert cli.main([command, *map(str, argv)]) == code
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    return run
