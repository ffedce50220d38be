"""What a person sees: a progress bar on a terminal, plain lines in a log, tables of scores."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lvlm_clorae.tasks import Counts


class Reporter:
    """Prints on rank 0, is silent elsewhere. Use as a context manager around the run.

    Args:
        active: whether this rank speaks
        log_every: steps between plain lines where the output is no terminal
    """

    def __init__(self, active: bool, log_every: int) -> None:
        self.console = Console(quiet=not active, soft_wrap=True, highlight=False)
        self._every = log_every
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (active and self.console.is_terminal),
            transient=True,
        )
        self._started = 0.0

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def begin(self, description: str, total: int, done: int = 0) -> None:
        """Start a bar of ``total`` steps of which ``done`` are behind us."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._description, self._total, self._done, self._first = description, total, done, done
        self._task = self._bar.add_task(description, total=total, completed=done, detail="")
        self._started = time.monotonic()

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Count ``steps`` done; a plain line every ``log_every`` of them where there is no terminal."""
        self._done += steps
        self._bar.update(self._task, completed=self._done, detail=detail)
        if not self.console.is_terminal and detail and self._done % self._every == 0:
            elapsed = time.monotonic() - self._started
            left = elapsed / max(1, self._done - self._first) * (self._total - self._done)
            self.say(f"{self._description} {self._done}/{self._total}  {detail}  {_clock(elapsed)} < {_clock(left)}")

    def steps_per_second(self) -> float:
        """The mean rate since :meth:`begin`."""
        return (self._done - self._first) / max(1e-6, time.monotonic() - self._started)

    def scores(
        self, title: str, counts: Mapping[str, Counts], columns: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        """A table of precision, recall and F1 a unit, further columns, and All, the sum of F1."""
        table = Table(title=title, title_justify="left")
        table.add_column("dataset")
        for name in ("P", "R", "F1", *(columns or {})):
            table.add_column(name, justify="right")
        for unit, count in counts.items():
            extra = [f"{values[unit]:.3f}" for values in (columns or {}).values()]
            table.add_row(unit, f"{count.precision:.1f}", f"{count.recall:.1f}", f"{count.f1:.1f}", *extra)
        table.add_section()
        table.add_row("All", "", "", f"{total_f1(counts):.1f} of {100 * len(counts)}", *[""] * len(columns or {}))
        self.console.print(table)


def total_f1(counts: Mapping[str, Counts]) -> float:
    """All: the sum of the units' F1 (Table 2 of the paper)."""
    return sum(count.f1 for count in counts.values())


def scores_json(counts: Mapping[str, Counts]) -> str:
    """The scores as JSON: per unit precision, recall and F1 in percent, their sum ``all`` and its maximum."""
    units = {name: {"precision": c.precision, "recall": c.recall, "f1": c.f1} for name, c in counts.items()}
    return json.dumps({"all": total_f1(counts), "maximum": 100.0 * len(counts), "units": units}, indent=1) + "\n"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
