"""Console output: a progress bar on a terminal, plain lines in a log, tables of scores."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lvlm_clorae.tasks import Counts


class Reporter:
    """Console output if ``active``, as a context manager; without a terminal a line every ``log_every`` steps."""

    def __init__(self, active: bool, log_every: int) -> None:
        self.console = Console(quiet=not active, soft_wrap=True, highlight=False)
        self._every = log_every
        counted = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        timed = TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        shown = active and self.console.is_terminal
        self._bar = Progress(*counted, *timed, console=self.console, disable=not shown, transient=True)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)

    def begin(self, description: str, total: int, done: int = 0) -> None:
        """Start a progress bar at ``done`` of ``total`` steps."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._description, self._total, self._done, self._first = description, total, done, done
        self._task = self._bar.add_task(description, total=total, completed=done, detail="")
        self._started = time.monotonic()

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Advance by ``steps``; without a terminal, print a plain line every ``log_every`` steps."""
        self._done += steps
        self._bar.update(self._task, completed=self._done, detail=detail)
        if not self.console.is_terminal and detail and self._done % self._every == 0:
            elapsed = time.monotonic() - self._started
            left = elapsed / max(1, self._done - self._first) * (self._total - self._done)
            self.say(f"{self._description} {self._done}/{self._total}  {detail}  {_clock(elapsed)} < {_clock(left)}")

    def steps_per_second(self) -> float:
        """Return the mean rate since :meth:`begin`."""
        return (self._done - self._first) / max(1e-6, time.monotonic() - self._started)

    def scores(
        self, title: str, counts: Mapping[str, Counts], columns: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        """Print a table of precision, recall, F1 and further columns by dataset task, and All, the sum of F1."""
        table = Table(title=title, title_justify="left")
        table.add_column("dataset")
        for name in ("P", "R", "F1", *(columns or {})):
            table.add_column(name, justify="right")
        for dataset_task, count in counts.items():
            extra = [f"{values[dataset_task]:.3f}" for values in (columns or {}).values()]
            table.add_row(dataset_task, f"{count.precision:.1f}", f"{count.recall:.1f}", f"{count.f1:.1f}", *extra)
        table.add_section()
        table.add_row("All", "", "", f"{total_f1(counts):.1f} of {100 * len(counts)}", *[""] * len(columns or {}))
        self.console.print(table)


def total_f1(counts: Mapping[str, Counts]) -> float:
    """Return All, the sum of the dataset tasks' F1 (Table 2 of the paper)."""
    return sum(count.f1 for count in counts.values())


def scores_json(counts: Mapping[str, Counts]) -> str:
    """Return JSON with precision, recall and F1 of each dataset task in percent, their sum ``all`` and its maximum."""
    dataset_tasks = {name: {"precision": c.precision, "recall": c.recall, "f1": c.f1} for name, c in counts.items()}
    scores = {"all": total_f1(counts), "maximum": 100.0 * len(counts), "dataset_tasks": dataset_tasks}
    return json.dumps(scores, indent=1) + "\n"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
