"""A comparison as tables to look at or to paste into a paper, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lvlm_clorae.analysis.compare import Comparison, System

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Sheet:
    """Rows of texts under a title; ``best`` holds (row, column) of what stands out."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    best: set[tuple[int, int]] = field(default_factory=set)

    def rich(self) -> Table:
        """For a terminal; the sub-task stands below its dataset."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.title), title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(escape(column.replace("/", "\n")), justify="right" if number else "left")
        for number, row in enumerate(self.rows):
            cells = map(escape, row)
            table.add_row(
                *(f"[bold]{cell}[/bold]" if (number, at) in self.best else cell for at, cell in enumerate(cells))
            )
        return table

    def markdown(self) -> str:
        """With alignment and the best in bold."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)]]
        for number, row in enumerate(self.rows):
            cells = [cell.replace("|", r"\|") for cell in row]
            lines.append([f"**{cell}**" if (number, at) in self.best else cell for at, cell in enumerate(cells)])
        return f"{self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sheets(found: Comparison) -> Iterator[Sheet]:
    """Table 2's form, and where there are several systems Table 3's: differences to the reference."""
    yield _scores(found)
    if len(found.systems) > 1:
        yield _differences(found)


def to_json(found: Comparison) -> str:
    """All of it, unrounded. ``paper`` is null where no row of the paper is like it."""
    content = {
        "units": found.units,
        "reference": found.reference.name,
        "systems": [_to_dict(found, system) for system in found.systems],
        "notes": found.notes,
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _scores(found: Comparison) -> Sheet:
    sheet = Sheet("test F1, %", ["system", "seeds", "trained, M", *found.columns])
    own = {}  # row of the sheet -> its system; the paper's rows are between
    for system in found.systems:
        own[len(sheet.rows)] = system
        trained = "" if system.trained is None else f"{system.trained / 1e6:.2f}"
        cells = [_mean(system, column) for column in found.columns]
        sheet.rows.append([system.name, str(len(system.runs)), trained, *cells])
        if system.paper:
            trained = "" if system.paper.trained is None else f"{system.paper.trained:g}"
            sheet.rows.append([_paper_name(system), "", trained, *_cells(found, system.paper.f1.get, "{:.1f}")])
    if not any(row[2] for row in sheet.rows):
        sheet.columns.pop(2)
        for row in sheet.rows:
            row.pop(2)
    if len(own) > 1:
        for at, column in enumerate(found.columns, len(sheet.columns) - len(found.columns)):
            means = {number: round(system.row.mean(column) or 0.0, 1) for number, system in own.items()}
            best = max(means.values())
            sheet.best |= {(number, at) for number, mean in means.items() if mean == best and sheet.rows[number][at]}
    return sheet


def _differences(found: Comparison) -> Sheet:
    sheet = Sheet(f"difference to {found.reference.name}", ["system", *found.columns])
    for system in found.systems:
        if system is found.reference:
            continue
        sheet.rows.append([system.name, *_cells(found, partial(found.difference, system), "{:+.1f}")])
        paper = _cells(found, partial(found.paper_difference, system), "{:+.1f}")
        if any(paper):
            sheet.rows.append([_paper_name(system), *paper])
    return sheet


def _paper_name(system: System) -> str:
    return f"  paper, {system.paper.table}: {system.paper.name}" if system.paper else ""


def _cells(found: Comparison, value: Callable[[str], float | None], form: str) -> list[str]:
    values = [value(column) for column in found.columns]
    return ["" if number is None else form.format(number) for number in values]


def _mean(system: System, column: str) -> str:
    mean, sd = system.row.mean(column), system.row.sd(column)
    return "" if mean is None else f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}")


def _to_dict(found: Comparison, system: System) -> dict[str, Any]:
    row, paper = system.row, system.paper
    return {
        "name": system.name,
        "runs": [str(run) for run in system.runs],
        "seeds": list(row.scores),
        "settings": row.settings,
        "trained": system.trained,
        "scores": {
            column: {
                "mean": row.mean(column),
                "sd": row.sd(column),
                "values": row.values(column),
                "difference": found.difference(system, column),
            }
            for column in found.columns
        },
        "paper": {"name": paper.name, "table": paper.table, "f1": paper.f1, "trained_millions": paper.trained}
        if paper
        else None,
    }
