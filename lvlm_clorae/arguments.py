"""Command lines whose mistakes are UserErrors with the nearest valid name."""

from __future__ import annotations

import argparse
import sys
from itertools import takewhile
from typing import Any, NoReturn

from lvlm_clorae.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """An argparse parser, also of its sub-commands, that takes no abbreviations and never exits on a mistake.

    Raises:
        UserError: from ``parse_args``, for an unknown option, command or choice, a missing or malformed value.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Looked for first: argparse would complain of the option that is missing rather than of the one misspelt.
        given = list(sys.argv[1:] if args is None else args)
        own = given if self._subparsers is None else takewhile(lambda argument: argument.startswith("-"), given)
        for argument in takewhile(lambda argument: argument != "--", own):
            flag = argument.split("=", 1)[0]
            if flag.startswith("--") and " " not in flag and flag not in self._option_string_actions:
                self._unknown(flag)
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._unknown(unknown[0])
        return parsed, unknown

    def _unknown(self, argument: str) -> NoReturn:
        hint = nearest(argument, self._option_string_actions) if argument.startswith("-") else ""
        kind = "option" if argument.startswith("-") else "argument"
        raise UserError(f"{self.prog} has no {kind} {argument}.{hint}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = "command" if isinstance(action, argparse._SubParsersAction) else f"choice of {action.dest}"
            raise UserError(f'{self.prog}: "{value}" is no {kind}.{nearest(str(value), map(str, action.choices))}')
