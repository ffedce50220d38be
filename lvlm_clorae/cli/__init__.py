"""Command line ``lvlm-clorae``: one module a sub-command, imported when it is run."""

import importlib
import io
import os
import sys

from lvlm_clorae.arguments import Parser
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import long_names
from lvlm_clorae.imports import RARELY_USED, load_at_first_use
from lvlm_clorae.quiet import quiet_libraries

COMMANDS = {
    "train": "fine-tune a model; as train.py",
    "align": "train the projector of a new base on captions",
    "predict": "extract records from a text and an image",
    "evaluate": "score a run on a split",
    "shards": "build, verify or inspect shards",
    "sweep": "run and compare many settings",
    "compare": "compare test scores of runs",
    "routing": "measure where the gate of a run sends tokens",
    "cost": "count parameters; estimate memory",
    "doctor": "check the environment and suggest fixes",
}
"""Each sub-command, which is a module of this package with a function ``main(argv)``, and its help."""
NESTED = {"shards": ("build", "verify", "inspect", "demo"), "sweep": ("expand", "status", "collect")}
"""The commands of sub-commands that have some."""


@quiet_libraries()
def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success, 1 for invalid data, 2 for a mistake that the user can fix, 130 on Ctrl-C, 141 on a closed pipe
    """
    load_at_first_use(*RARELY_USED)
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal
    if words and words[0].startswith("--local_rank="):  # added by the deepspeed launcher
        del words[0]
    try:
        if words and (command := next((name for name, inner in NESTED.items() if words[0] in inner), None)):
            raise UserError(f'lvlm-clorae: "{words[0]}" is no command. It is lvlm-clorae {command} {words[0]}.')
        if not words or words[0] not in COMMANDS:
            _parser().parse_args(words)
        with long_names():
            return int(importlib.import_module(f"lvlm_clorae.cli.{words[0]}").main(words[1:]))
    except UserError as error:
        if not error.everywhere or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        return 141


def _parser() -> Parser:
    """Build the parser for ``--help``, ``--version`` and unknown commands."""
    from lvlm_clorae import __version__

    parser = Parser(prog="lvlm-clorae", description="Multimodal information extraction with C-LoRAE.")
    parser.add_argument("--version", action="version", version=f"lvlm-clorae {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser
