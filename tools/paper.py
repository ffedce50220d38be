"""The paper's published figures (arXiv 2505.06303, Tables 2 to 5), and runs beside them (docs/reproduce.md).

    python -m tools.paper runs/paper/clorae-large runs/paper/umie-large

Figures are as printed. C-LoRAE base has 503.9 for All, although its figures add up to 504.3. MED of C-LoRAE large is
64.5 in Table 2 and 64.0 in Table 3; All, 521.3, is the sum with 64.0. Trained parameters are from Table 5, those of the
ablations from Table 3.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lvlm_clorae.analysis.compare import RunTable, compare
from lvlm_clorae.analysis.names import ALL, SYSTEMS, UMIE, ablations, deviations, format_value, recipe_config
from lvlm_clorae.analysis.tables import TRAINED, Sheet, sheets, to_json
from lvlm_clorae.cli.compare import make_parser, show
from lvlm_clorae.training.config import TrainConfig
from tools import exit_on_error

DATASET_TASKS = (
    *("twitter15/entity", "twitter17/entity", "snap/entity", "mre_v1/relation", "mre_v2/relation"),
    *("m2e2/trigger", "m2e2/argument"),
)
"""Columns of Tables 2 and 3; the last two are MED and MEAE."""
TESTED_ONLY = "m2e2"  # held out from training in every row: the events are trained on ACE 2005 and SWiG
UNSEEN = ("twitter17", "mre_v2")  # also held out in Table 4


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables."""

    model: str  # preset of the base
    adapter: str  # value of the setting ``adapter``
    table: str
    f1: dict[str, float]  # test F1 in percent by dataset task, and All, as far as printed
    without: tuple[str, ...] = ()  # ablations, named as in ABLATIONS
    held_out: tuple[str, ...] = ()  # datasets that are not trained on, besides M2E2
    trained: float | None = None  # parameters in millions
    forward: float | None = None  # GFLOPs; the paper does not say for which input

    @property
    def name(self) -> str:
        """Name in tables."""
        system = UMIE if self.adapter == "full" else SYSTEMS[self.adapter]
        held_out = (f"{' and '.join(self.held_out)} held out",) if self.held_out else ()
        return ", ".join([f"{system} {self.model.rpartition('-')[2]}", *self.without, *held_out])

    @property
    def recipe(self) -> str:
        """Name of its file in recipes/paper, without the suffix."""
        system = UMIE if self.adapter == "full" else self.adapter
        words = [system, self.model.rpartition("-")[2], *self.without, *(("unseen",) if self.held_out else ())]
        return "-".join(words).lower().replace(" ", "-")

    def settings(self) -> TrainConfig:
        """The configuration in that file, without ablations and the location of the data."""
        return replace(recipe_config(self.model, self.adapter), hold_out=[TESTED_ONLY, *self.held_out])


def _row(adapter: str, size: str, f1: str, trained: float | None, forward: float | None, *without: str) -> PaperRow:
    scores = dict(zip((*DATASET_TASKS, ALL), map(float, f1.split()), strict=True)) if f1 else {}
    table = "Table 3" if without else "Table 2" if f1 else "Table 5"
    return PaperRow(f"flan-t5-{size}", adapter, table, scores, without, trained=trained, forward=forward)


def _unseen(adapter: str, size: str, *figures: float) -> PaperRow:
    f1 = {f"{UNSEEN[0]}/entity": figures[0], f"{UNSEEN[1]}/relation": figures[1]}
    return PaperRow(f"flan-t5-{size}", adapter, "Table 4", f1, held_out=UNSEEN)


ROWS = (
    _row("full", "base", "76.1 88.1 87.7 84.3 74.8 60.5 22.5 494.0", 287.0, 21.3),
    _row("full", "large", "77.2 90.7 90.5 85.0 75.5 61.0 23.6 503.5", 843.0, 73.2),
    _row("full", "xl", "78.2 91.4 91.0 86.4 76.2 62.1 24.5 509.8", None, None),
    _row("clorae", "base", "74.4 86.3 85.8 87.3 81.4 60.7 28.4 503.9", 30.4, 23.2),
    _row("clorae", "large", "75.9 88.9 89.3 89.2 82.8 64.5 31.2 521.3", 39.9, 75.7),
    _row("clorae", "xl", "77.8 89.8 90.5 89.6 83.2 63.5 32.6 527.0", None, None),
    _row("clorae", "large", "74.5 87.8 88.1 82.1 74.9 61.0 25.3 493.7", 19.0, None, "only universal"),
    _row("clorae", "large", "72.9 85.2 82.3 85.8 81.2 62.4 29.5 499.3", 19.0, None, "only task experts"),
    _row("clorae", "large", "74.9 87.8 88.4 86.4 80.8 61.8 27.8 507.9", 38.0, None, "no gate"),
    _row("clorae", "large", "74.3 87.2 86.8 87.6 81.7 63.3 29.8 510.7", 39.0, None, "no achievement loss"),
    _row("clorae", "large", "75.4 88.2 88.1 87.1 82.0 63.8 30.2 514.8", 39.0, None, "no MIM"),
    _row("lora", "base", "", 15.5, 22.0),
    _row("lora", "large", "", 20.3, 74.1),
    _row("moslora", "base", "", 15.8, 26.3),
    _row("moslora", "large", "", 20.4, 89.1),
    _row("loramoe", "base", "", 30.5, 22.7),
    _row("loramoe", "large", "", 40.0, 75.2),
    _unseen("full", "base", 66.8, 67.3),
    _unseen("full", "large", 68.5, 68.8),
    _unseen("clorae", "base", 66.2, 76.5),
    _unseen("clorae", "large", 67.8, 78.2),
)


def paper_row(config: TrainConfig) -> PaperRow | None:
    """The row with this system, base and held-out datasets; other settings are not compared."""
    held_out = set(config.hold_out) - {TESTED_ONLY}
    for row in ROWS:
        same = (row.model, row.adapter, list(row.without), set(row.held_out))
        if same == (Path(config.model).name, config.adapter, ablations(config), held_out):
            return row
    return None


def unlike(config: TrainConfig, row: PaperRow) -> dict[str, Any]:
    """The settings of a run that differ from the recipe of its row, except where base and data are stored."""
    found = deviations(config, row.settings())
    if set(config.hold_out) == {TESTED_ONLY, *row.held_out}:
        found.pop("hold_out", None)
    return {name: value for name, value in found.items() if name not in ("model", "shards")}


Papers = Mapping[str, PaperRow | None]
"""Name of a run's row -> the corresponding row of the paper."""


def compare_with_paper(
    runs: Sequence[Path], reference: Path | None = None, dataset_tasks: Sequence[str] | None = None
) -> tuple[RunTable, Papers]:
    """Compare run directories as :func:`compare`, by default in the paper's columns, and find their rows in the paper.

    The notes of the table say which run has none, and which differs from its recipe.
    """
    table = compare(runs, reference=reference, dataset_tasks=dataset_tasks)
    own = [name for name in DATASET_TASKS if name in table.dataset_tasks]
    if own and not dataset_tasks:
        table = compare(runs, reference=reference, dataset_tasks=own)
    papers = {row.name: paper_row(row.config) for row in table.rows}
    for row in table.rows:
        paper = papers[row.name]
        if paper is None:
            table.notes.append(f"{row.name}: the paper has no corresponding row")
        elif others := unlike(row.config, paper):
            words = ", ".join(f"{name}={format_value(value)}" for name, value in others.items())
            table.notes.append(f"{row.name}: differs from recipes/paper in {words}")
    return table, papers


def sheets_with_paper(table: RunTable, papers: Papers) -> Iterator[Sheet]:
    """The sheets of a table, with the paper's figures or differences below each row."""
    scores, *differences = sheets(table)
    if TRAINED not in scores.columns and any(paper and paper.trained for paper in papers.values()):
        at = len(scores.columns) - len(table.columns)
        for line, cell in ((scores.columns, TRAINED), *((row, "") for row in scores.rows)):
            line.insert(at, cell)
        scores.best = {(row, column + (column >= at)) for row, column in scores.best}
    yield _interleaved(scores, papers, _figures)
    reference = papers[table.reference.name] if table.reference else None
    for sheet in differences:
        yield _interleaved(sheet, papers, lambda paper: _differences(paper, reference))


def _figures(paper: PaperRow) -> dict[str, str]:
    trained = {} if paper.trained is None else {TRAINED: f"{paper.trained:g}"}
    return {**trained, **{column: f"{f1:.1f}" for column, f1 in paper.f1.items()}}


def _differences(paper: PaperRow, reference: PaperRow | None) -> dict[str, str]:
    """The paper's differences of two of its rows."""
    if reference is None or reference is paper:
        return {}
    return {name: f"{f1 - reference.f1[name]:+.1f}" for name, f1 in paper.f1.items() if name in reference.f1}


def _interleaved(sheet: Sheet, papers: Papers, cells: Callable[[PaperRow], dict[str, str]]) -> Sheet:
    rows: list[list[str]] = []
    place = {}
    for number, row in enumerate(sheet.rows):
        place[number] = len(rows)
        rows.append(row)
        paper = papers[row[0]]
        found = cells(paper) if paper else {}
        if paper and any(column in found for column in sheet.columns):
            name = f"  paper, {paper.table}: {paper.name}"
            rows.append([name, *(found.get(column, "") for column in sheet.columns[1:])])
    return replace(sheet, rows=rows, best={(place[row], column) for row, column in sheet.best})


def json_with_paper(table: RunTable, papers: Papers) -> str:
    """The table as JSON; ``paper`` of a row is null if the paper has no corresponding one."""
    content = json.loads(to_json(table))
    for row in content["rows"]:
        paper = papers[row["name"]]
        row["paper"] = None
        if paper:
            figures = {"table": paper.table, "f1": paper.f1, "trained_millions": paper.trained}
            row["paper"] = {"name": paper.name, **figures}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Print the tables of runs and the paper, and draw a radar of the runs."""
    parser = make_parser("python -m tools.paper", "Compare test F1 of runs with the paper (docs/reproduce.md).")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a radar plot, one axis per column (Figure 4)")
    with exit_on_error():
        arguments = parser.parse_args(argv)
        table, papers = compare_with_paper(arguments.runs, arguments.reference, arguments.dataset_tasks)
        if arguments.png:
            from tools.radar import plot_radar

            table.notes += plot_radar(table, arguments.png)
    show(arguments, json_with_paper(table, papers), sheets_with_paper(table, papers), table.notes)


if __name__ == "__main__":
    main()
