"""Print and write a table of runs: for a terminal, as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lvlm_clorae.analysis import plots
from lvlm_clorae.analysis.compare import Row, RunTable
from lvlm_clorae.analysis.names import format_value
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.sweep.expand import Sweep

if TYPE_CHECKING:
    from rich.table import Table

TRAINED = "trained, M"
"""Column of the trained parameters."""


@dataclass
class Sheet:
    """Rows of text under a title."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    best: set[tuple[int, int]] = field(default_factory=set)  # (row, column) of the cells in bold
    left: int = 1  # columns that are aligned to the left

    def __rich__(self) -> Table:
        """Render for a terminal, with the sub-task below its dataset."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title) if self.title else None, title_justify="left")
        for at, column in enumerate(self.columns):
            justify: Literal["left", "right"] = "left" if at < self.left else "right"
            table.add_column(Text(column.replace("/", "\n")), justify=justify, overflow="fold")
        for number, row in enumerate(self.rows):
            table.add_row(*(Text(c, "bold" if (number, at) in self.best else "") for at, c in enumerate(row)))
        return table

    def markdown(self) -> str:
        """Render as Markdown, with alignment and the best cells in bold."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)]]
        for number, row in enumerate(self.rows):
            cells = [cell.replace("|", r"\|") for cell in row]
            lines.append([f"**{cell}**" if (number, at) in self.best else cell for at, cell in enumerate(cells)])
        return f"{self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sheets(table: RunTable) -> Iterator[Sheet]:
    """The scores (Table 2 of the paper) and, with a reference and several rows, the differences to it (Table 3)."""
    yield _scores(table)
    if table.reference and len(table.rows) > 1:
        yield _differences(table, table.reference)


def to_json(table: RunTable, **extra: Any) -> str:
    """Everything, unrounded."""
    reference = table.reference.name if table.reference else None
    plain = {name: getattr(table, name) for name in ("keys", "dataset_tasks", "unfinished", "notes")}
    content = {**extra, **plain, "reference": reference, "rows": [_to_dict(table, row) for row in table.rows]}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def to_csv(table: RunTable) -> str:
    """One line a row: name, settings, number of seeds, trained parameters, mean and deviation of every score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}_{what}" for name in table.columns for what in ("mean", "sd")]
    writer.writerow(["name", *table.keys, "seeds", "trained_parameters", *columns])
    for row in table.rows:
        settings = (format_value(row.settings[key]) for key in table.keys)
        scores = [value for name in table.columns for value in (row.mean(name), row.sd(name))]
        writer.writerow([row.name, *settings, len(row.scores), row.trained_parameters, *scores])
    return text.getvalue()


def write_sweep(sweep: Sweep, table: RunTable) -> list[Path]:
    """Write a sweep's table into its directory, with plots if settings are varied. Returns the paths."""
    paths = [sweep.output_dir / "sweep.csv", sweep.output_dir / "sweep.json"]
    write_text_atomic(paths[0], to_csv(table))
    write_text_atomic(paths[1], to_json(table, sweep=str(sweep.path)))
    if table.keys:
        paths.append(sweep.output_dir / "sweep.png")
        plots.plot_sweep(table, paths[-1])
        by_task = sweep.output_dir / "sweep-dataset-tasks.png"
        if plots.plot_dataset_tasks(table, by_task):
            paths.append(by_task)
    return paths


def _scores(table: RunTable) -> Sheet:
    sheet = Sheet("test F1, %", [*(table.keys or ["system"]), "seeds", TRAINED, *table.columns])
    for row in table.rows:
        head = [format_value(row.settings[key]) for key in table.keys] or [row.name]
        trained = "" if row.trained_parameters is None else f"{row.trained_parameters / 1e6:.2f}"
        sheet.rows.append([*head, str(len(row.runs)), trained, *(_mean(row, column) for column in table.columns)])
    at_trained = len(sheet.columns) - len(table.columns) - 1
    if not any(line[at_trained] for line in sheet.rows):
        for line in (sheet.columns, *sheet.rows):
            line.pop(at_trained)
    if len(table.rows) > 1:
        for at, column in enumerate(table.columns, len(sheet.columns) - len(table.columns)):
            means = [round(row.mean(column) or 0.0, 1) for row in table.rows]
            best = max(means)
            sheet.best |= {(n, at) for n, mean in enumerate(means) if mean == best and sheet.rows[n][at]}
    return sheet


def _differences(table: RunTable, reference: Row) -> Sheet:
    sheet = Sheet(f"difference to {reference.name}", ["system", *table.columns])
    for row in table.rows:
        if row is not reference:
            values = (table.difference(row, column) for column in table.columns)
            sheet.rows.append([row.name, *("" if value is None else f"{value:+.1f}" for value in values)])
    return sheet


def _mean(row: Row, column: str) -> str:
    mean, sd = row.mean(column), row.sd(column)
    return "" if mean is None else f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}")


def _to_dict(table: RunTable, row: Row) -> dict[str, Any]:
    scores = {
        column: {
            "mean": row.mean(column),
            "sd": row.sd(column),
            "values": row.values(column),
            "difference": table.difference(row, column),
        }
        for column in table.columns
    }
    return {
        "name": row.name,
        "settings": row.settings,
        "runs": [str(run) for run in row.runs],
        "seeds": list(row.scores),
        "trained_parameters": row.trained_parameters,
        "scores": scores,
    }
