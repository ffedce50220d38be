"""Console output: a progress bar on a terminal, plain lines in a log, tables of scores."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lvlm_clorae.console import make_console
from lvlm_clorae.tasks import Counts


class Reporter:
    """Console output if ``active``, as a context manager: a progress bar, or plain lines without a terminal."""

    def __init__(self, active: bool) -> None:
        self.console = make_console(quiet=not active, soft_wrap=True)
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

    def advance(self, steps: int = 1, detail: str | None = None) -> None:
        """Advance by ``steps``. Without a terminal, print a plain line for a ``detail``, or for each tenth if None."""
        tenths = 10 * self._done // max(1, self._total)
        self._done += steps
        self._bar.update(self._task, completed=self._done, detail=detail or "")
        due = bool(detail) if detail is not None else 10 * self._done // max(1, self._total) > tenths
        if not self.console.is_terminal and due:
            self.say(f"{self._description} {self._done}/{self._total}  {detail or ''}".rstrip())

    def steps_per_second(self) -> float:
        """Return the mean rate since :meth:`begin`."""
        return (self._done - self._first) / max(1e-6, time.monotonic() - self._started)

    def scores(
        self, title: str, counts: Mapping[str, Counts], columns: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        """Print a table of precision, recall, F1 and further columns by dataset task, and All, the sum of F1.

        A dataset task that is only in ``columns`` has no scores, and a "-" in their place.
        """
        table = Table(title=title, title_justify="left")
        table.add_column("dataset")
        for name in ("P", "R", "F1", *(columns or {})):
            table.add_column(name, justify="right")
        for name in dict.fromkeys([*counts, *(name for values in (columns or {}).values() for name in values)]):
            extra = [f"{values[name]:.3f}" if name in values else "-" for values in (columns or {}).values()]
            found = counts.get(name)  # None without a split of this dataset
            shares = (found.precision, found.recall, found.f1) if found else ()
            table.add_row(name, *([f"{share:.1f}" for share in shares] or ["-"] * 3), *extra)
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


def clock(seconds: float) -> str:
    """Format a duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
