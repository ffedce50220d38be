"""``lvlm-clorae compare``: compare test scores of runs."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lvlm_clorae.arguments import Parser
from lvlm_clorae.console import make_console

if TYPE_CHECKING:
    from lvlm_clorae.analysis.tables import Sheet


def main(argv: list[str]) -> int:
    """Print a table of runs."""
    text = "Compare test F1 of runs: one row for runs that differ in the seed only, and the difference of each from a "
    arguments = make_parser("lvlm-clorae compare", f"{text}reference (docs/reproduce.md).").parse_args(argv)
    from lvlm_clorae.analysis.compare import compare
    from lvlm_clorae.analysis.tables import sheets, to_json

    found = compare(arguments.runs, reference=arguments.reference, dataset_tasks=arguments.dataset_tasks)
    show(arguments, to_json(found), sheets(found), found.notes)
    return 0


def show(arguments: argparse.Namespace, json: str, sheets: Iterable["Sheet"], notes: Iterable[str]) -> None:
    """Print a table of runs in the form that the flags choose."""
    if arguments.json:
        print(json, end="")
        return
    if arguments.markdown:
        print("\n".join(sheet.markdown() for sheet in sheets))
    else:
        make_console(width=200).print(*sheets)
    for note in notes:
        print(note, file=sys.stderr if arguments.markdown else sys.stdout)


def make_parser(prog: str, description: str) -> Parser:
    """Build a parser of the flags that choose runs, columns and form of a table."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, e.g. runs/*")
    parser.add_argument("--reference", type=Path, metavar="RUN", help="reference of the differences (first run)")
    parser.add_argument(
        "--dataset_tasks", nargs="+", metavar="NAME", help="columns, summed in All, e.g. twitter15/entity"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    form.add_argument("--json", action="store_true", help="print JSON")
    return parser
