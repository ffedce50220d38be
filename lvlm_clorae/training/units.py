"""What a run trains on, what it only tests, and the F1 that each unit is measured by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lvlm_clorae.data.index import Index
from lvlm_clorae.data.units import Unit, find_units
from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.training.config import TrainConfig

DEFAULT_REFERENCE = 100.0
"""In percent, of a unit for which nothing better is known."""


@dataclass(frozen=True)
class RunUnits:
    """The units of each split, by name. Datasets held out are in ``test`` alone (Table 4 of the paper)."""

    train: dict[str, Unit]
    dev: dict[str, Unit]
    test: dict[str, Unit]

    def reference(self) -> dict[str, float]:
        """The reference F1 of what is trained, in percent."""
        return {name: unit.reference_f1 or DEFAULT_REFERENCE for name, unit in self.train.items()}


def choose_units(index: Index, config: TrainConfig) -> RunUnits:
    """The units of a run.

    Raises:
        UserError: ``hold_out`` or ``reference_f1`` name what is not there, or leave a task without training data; a
            reference F1 that is no percentage.
    """
    held_out = _held_out(index, config.hold_out)
    train, dev, test = (find_units(index, split) for split in ("train", "dev", "test"))
    left = {unit.task for unit in train.values() if unit.dataset not in held_out}
    for unit in train.values():
        if unit.task not in left:
            raise UserError(
                f"hold_out leaves no training data for {unit.task}, so its expert would stay untrained. "
                f"Keep one dataset of that task, or build shards without it."
            )
    given = _references(config.reference_f1, {**train, **dev, **test})

    def kept(units: dict[str, Unit], all_of_them: bool = False) -> dict[str, Unit]:
        return {
            name: replace(unit, reference_f1=given.get(name, unit.reference_f1))
            for name, unit in units.items()
            if all_of_them or unit.dataset not in held_out
        }

    return RunUnits(kept(train), kept(dev), kept(test, all_of_them=True))


def _held_out(index: Index, names: list[str]) -> set[str]:
    for name in names:
        if name not in index.datasets:
            raise UserError(f'hold_out: there is no dataset "{name}".{nearest(name, index.datasets)}')
        if not index.datasets[name].samples("test"):
            raise UserError(f'hold_out: "{name}" has no test split, so holding it out would show nothing.')
    return set(names)


def _references(given: list[str], units: dict[str, Unit]) -> dict[str, float]:
    found = {}
    for entry in given:
        name, _, value = entry.partition("=")
        if name not in units:
            raise UserError(f'reference_f1: there is no "{name}".{nearest(name, units)}')
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = float("nan")
        if not 0 < found[name] <= 100:
            raise UserError(f'reference_f1: "{entry}" gives no percentage. Write {name}=78.9.')
    return found
