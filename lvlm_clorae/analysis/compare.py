"""Runs beside one another: test F1 of each, and how far it is from a reference (Tables 2 and 3 of the paper)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lvlm_clorae.analysis.paper import UNITS, PaperRow, paper_row, unlike
from lvlm_clorae.analysis.systems import deciding, names
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.sweep.collect import ALL, Row, read_scores, spelt
from lvlm_clorae.training.config import TrainConfig, read_config

WEIGHTS = "adapter/adapter_model.safetensors"
_LONGEST_HEADER = 1 << 27


@dataclass
class System:
    """The runs that differ in nothing but the seed.

    Args:
        config: of the first of them
        row: its name and the scores of each seed: the columns that it has, and ``All`` where it has all of them
        runs: their directories, in the order of the seeds in ``row``
        trained: trained parameters, where the run directory has them in one file
        paper: the row of the paper that it can be put beside
    """

    config: TrainConfig
    row: Row
    runs: list[Path]
    trained: int | None = None
    paper: PaperRow | None = None

    @property
    def name(self) -> str:
        return self.row.group


@dataclass
class Comparison:
    """Systems in the order in which they were given.

    Args:
        units: the columns
        notes: what is left out, and what has to be known of a row; a line each
    """

    systems: list[System]
    units: list[str]
    reference: System
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        return [*self.units, ALL]

    def difference(self, system: System, column: str) -> float | None:
        """Mean test F1 less the reference's; None where one of them has no score."""
        mean, reference = system.row.mean(column), self.reference.row.mean(column)
        return None if mean is None or reference is None else mean - reference

    def paper_difference(self, system: System, column: str) -> float | None:
        """The same of the paper's figures, where they are two rows."""
        own, reference = system.paper, self.reference.paper
        if own is None or reference is None or own is reference or column not in own.f1 or column not in reference.f1:
            return None
        return own.f1[column] - reference.f1[column]


def compare(
    runs: Sequence[Path],
    *,
    reference: Path | None = None,
    units: Sequence[str] | None = None,
    paper: bool = False,
) -> Comparison:
    """The comparison of run directories.

    Args:
        reference: the run, one of them, that differences are taken to; the first by default
        units: the columns, of which ``All`` is the sum; by default those that any run has
        paper: put the paper's rows beside, and show the paper's columns alone where there are any

    Raises:
        UserError: a path that is not there, nothing that has scores, a reference that is not shown, a unit of no run.
    """
    read: list[tuple[Path, TrainConfig, dict[str, float]]] = []
    notes = []
    for run in _distinct(runs):
        try:
            read.append((run, *_read(run)))
        except (UserError, ValueError) as error:
            notes.append(f"left out: {error}")
    if not read:
        raise UserError(
            "None of these is a run that has ended with scores on test:" + "".join(f"\n  {note}" for note in notes)
        )
    known = list(dict.fromkeys(unit for _, _, scores in read for unit in scores if unit != ALL))
    chosen = _columns(known, units, paper)
    systems: list[System] = []
    for run, config, scores in read:
        _add(systems, run, config, {name: scores[name] for name in chosen if name in scores}, len(chosen))
    _name(systems)
    for system in systems:
        system.trained = trained_parameters(system.runs[0])
        system.paper = paper_row(system.config) if paper else None
    found = Comparison(systems, chosen, _find(systems, reference), notes)
    found.notes += _of_columns(found, known)
    if paper:
        found.notes += _of_paper(found)
    return found


def trained_parameters(run: Path) -> int | None:
    """The parameters in the adapter of a run, from the header of its file; None where there is no such file."""
    try:
        with open(run / WEIGHTS, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        return None


def _distinct(runs: Iterable[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for run in runs:
        if not run.exists():
            raise UserError(f"{run}: no such run directory. Give those that train.py wrote, as runs/*.")
        found.setdefault(run.resolve(), run)
    return list(found.values())


def _read(run: Path) -> tuple[TrainConfig, dict[str, float]]:
    """Raises UserError or ValueError, which say what of the run is missing or damaged."""
    if not run.is_dir() or not (run / "config.yaml").is_file():
        raise UserError(f"{run}: is no run directory (there is no config.yaml in it)")
    config = read_config(run / "config.yaml")
    path = run / "scores.json"
    try:
        return config, read_scores(path)
    except ValueError as error:
        why = "there is none; the run has not ended, or has no test split" if not path.exists() else error
        raise ValueError(f"{path}: {why}") from None


def _columns(known: list[str], units: Sequence[str] | None, paper: bool) -> list[str]:
    for unit in units or ():
        if unit not in known:
            raise UserError(f'--units: no run has scores of "{unit}".{nearest(unit, known)}')
    if units:
        return list(dict.fromkeys(units))
    papers = [unit for unit in UNITS if unit in known] if paper else []
    return papers or known


def _add(systems: list[System], run: Path, config: TrainConfig, scores: dict[str, float], columns: int) -> None:
    """To the system of the same settings; a second run of one seed is no other sample, but a row of its own."""
    if len(scores) == columns:
        scores[ALL] = sum(scores.values())
    for system in systems:
        if deciding(system.config) == deciding(config) and config.seed not in system.row.scores:
            system.row.scores[config.seed] = scores
            system.runs.append(run)
            return
    systems.append(System(config, Row("", {}, {config.seed: scores}), [run]))


def _name(systems: list[System]) -> None:
    found = names([system.config for system in systems])
    for system, name in zip(systems, found, strict=True):
        system.row.group = name if found.count(name) == 1 else f"{name} ({system.runs[0]})"
        system.row.settings = deciding(system.config)


def _find(systems: list[System], reference: Path | None) -> System:
    if reference is None:
        return systems[0]
    for system in systems:
        if reference.resolve() in [run.resolve() for run in system.runs]:
            return system
    shown = ", ".join(str(system.runs[0]) for system in systems)
    raise UserError(f"--reference {reference}: is none of the runs that are shown. Choose one of: {shown}.")


def _of_columns(found: Comparison, known: list[str]) -> list[str]:
    notes = []
    for system in found.systems:
        lacking = [unit for unit in found.units if system.row.mean(unit) is None]
        if lacking:
            notes.append(f"no All of {system.name}: it has no scores of {', '.join(lacking)} (--units chooses columns)")
    dropped = [unit for unit in known if unit not in found.units]
    if dropped:
        notes.append(f"not among the columns, nor in All: {', '.join(dropped)}")
    return notes


def _of_paper(found: Comparison) -> list[str]:
    notes = []
    for system in found.systems:
        if system.paper is None:
            notes.append(f"{system.name}: no row of the paper is like it")
        elif others := unlike(system.config, system.paper):
            words = ", ".join(f"{name}={spelt(value)}" for name, value in others.items())
            notes.append(f"{system.name}: otherwise than recipes/paper has it: {words}")
    return notes
