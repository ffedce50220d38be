"""``lvlm-clorae compare``: compare test scores of runs."""

import sys
from pathlib import Path

from lvlm_clorae.arguments import Parser
from lvlm_clorae.cli import print_tables


def main(argv: list[str]) -> int:
    """Print a table of runs, and draw them."""
    arguments = _parser().parse_args(argv)
    from lvlm_clorae.analysis.compare import compare
    from lvlm_clorae.analysis.tables import sheets, to_json

    found = compare(
        arguments.runs, reference=arguments.reference, dataset_tasks=arguments.dataset_tasks, paper=arguments.paper
    )
    if arguments.png:
        from lvlm_clorae.analysis.plots import plot_radar

        found.notes += plot_radar(found, arguments.png)
    if arguments.json:
        print(to_json(found), end="")
        return 0
    if arguments.markdown:
        print("\n".join(sheet.markdown() for sheet in sheets(found)))
    else:
        print_tables(sheets(found), width=200)
    for note in found.notes:
        print(note, file=sys.stderr if arguments.markdown else sys.stdout)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lvlm-clorae compare",
        description="Compare test F1 of runs: one row for runs that differ in the seed only, and the difference of "
        "each from a reference (docs/reproduce.md).",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, e.g. runs/*")
    parser.add_argument("--reference", type=Path, metavar="RUN", help="reference of the differences (first run)")
    parser.add_argument(
        "--dataset_tasks", nargs="+", metavar="NAME", help="columns, summed in All, e.g. twitter15/entity"
    )
    parser.add_argument("--paper", action="store_true", help="add the figures of the paper")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a radar plot, one axis per column (Figure 4)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    form.add_argument("--json", action="store_true", help="print JSON")
    return parser
