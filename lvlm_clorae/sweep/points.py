"""A sweep file and the points it stands for, each with the configuration of its run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from lvlm_clorae.errors import UserError, nearest
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.sweep.names import point_name
from lvlm_clorae.training.checks import check_values
from lvlm_clorae.training.config import FIELDS, TrainConfig, make_config, read_yaml

KEYS = ("output", "settings", "grid", "points", "seeds")
"""What a sweep file may hold."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        number: its place in the expansion, from 0
        varied: what it varies, the seed included, as its configuration has it
        config: of the run, with its ``output`` and ``resume=auto``
    """

    number: int
    varied: dict[str, Any]
    config: TrainConfig

    @property
    def name(self) -> str:
        return point_name(self.varied)

    @property
    def group(self) -> str:
        """The name without the seed: what several seeds repeat. Empty where nothing else is varied."""
        return point_name({key: value for key, value in self.varied.items() if key != "seed"})

    @property
    def directory(self) -> Path:
        return Path(str(self.config.output))

    def write_arguments(self) -> list[str]:
        """The arguments of ``train.py``; the settings stand in ``<run directory>.yaml``, which this writes.

        A file, since flags cannot say all that a setting may hold: no value (null) where the model's recipe has one,
        several lines, a name with a leading hyphen.

        Raises:
            UserError: the file cannot be written.
        """
        path = self.directory.with_name(self.name + ".yaml")
        try:
            write_text_atomic(path, f"# {self.name}, by lvlm-clorae sweep expand\n{self.config.to_yaml()}")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}). Choose another output.") from None
        return ["--config", str(path), "--output", str(self.directory), "--resume", "auto"]


@dataclass(frozen=True)
class Sweep:
    """A sweep file, expanded: grid, then points, each with all its seeds in a row."""

    path: Path
    output: Path
    points: list[Point]

    @property
    def keys(self) -> list[str]:
        """The settings that some point varies, besides the seed, in the order of the configuration."""
        return [key for key in FIELDS if key != "seed" and any(key in point.varied for point in self.points)]


def read_sweep(path: Path) -> Sweep:
    """The sweep of a YAML file.

    Raises:
        UserError: it cannot be read, an unknown key, a setting that ``make_config`` or ``check_values`` refuses,
            a setting that cannot be swept, two points with one configuration.
    """
    content = _read(path)
    output = content.get("output", f"runs/{path.stem}")
    if not isinstance(output, str) or not output:
        raise UserError(f"{path}: output must be a directory, but is {output!r}.")
    settings = _settings(path, "settings", content.get("settings"))
    mappings = [*_grid(path, content), *_points(path, content)]
    if not mappings:
        mappings = [("settings", {})]
    points: list[Point] = []
    known: dict[str, str] = {}
    for where, mapping in mappings:
        for varied in _with_seeds(path, where, mapping, content):
            config = _config(path, where, {**settings, **varied})
            exact = {key: getattr(config, key) for key in (*varied, "seed")}
            point = Point(
                len(points), exact, replace(config, output=str(Path(output) / point_name(exact)), resume="auto")
            )
            for same in (point.name, repr(config)):
                if same in known:
                    raise UserError(
                        f"{path}: {where}: {point.name} is the same run as {known[same]}, which is there already. "
                        "Remove one of them; for several runs of one point list seeds."
                    )
                known[same] = point.name
            points.append(point)
    return Sweep(path, Path(output), points)


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "sweep")
    if not isinstance(content, dict):
        raise UserError(f"{path}: a sweep is a mapping with any of the keys {', '.join(KEYS)}.")
    for key in content:
        if key not in KEYS:
            hint = nearest(str(key), KEYS)
            if str(key).replace("-", "_") in FIELDS:
                hint = " It is a setting: it belongs under settings, grid or points."
            raise UserError(f'{path}: a sweep has no key "{key}".{hint}')
    return {key: value for key, value in content.items() if value is not None}


def _settings(path: Path, where: str, mapping: Any) -> dict[str, Any]:
    """A mapping of settings to values, or to lists of them. Raises UserError for a name that is none."""
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: {where} must be a mapping of settings, but is {mapping!r}.")
    named = {str(key).replace("-", "_"): value for key, value in mapping.items()}
    for key in named:
        if key in ("output", "resume"):
            raise UserError(
                f"{path}: {where}: {key} is each run's own. The directory of all runs is output, beside settings."
            )
        if key not in FIELDS:
            raise UserError(f'{path}: {where}: there is no setting "{key}".{nearest(key, FIELDS)}')
    return named


def _grid(path: Path, content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    grid = _settings(path, "grid", content.get("grid"))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid: {key} must be a list of the values it takes, but is {values!r}.")
    if not grid:
        return []
    return [("grid", dict(zip(grid, values, strict=True))) for values in product(*grid.values())]


def _points(path: Path, content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    points = content.get("points", [])
    if not isinstance(points, list):
        raise UserError(f"{path}: points must be a list of mappings of settings, but is {points!r}.")
    named = [(f"points, number {number}", mapping) for number, mapping in enumerate(points, 1)]
    return [(where, _settings(path, where, mapping)) for where, mapping in named]


def _with_seeds(path: Path, where: str, mapping: dict[str, Any], content: dict[str, Any]) -> list[dict[str, Any]]:
    if "seeds" not in content:
        return [mapping]
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not seeds:
        raise UserError(f"{path}: seeds must be a list of whole numbers, but is {seeds!r}.")
    if "seed" in mapping:
        raise UserError(f"{path}: {where}: seed is given, but seeds are too. Keep one of them.")
    return [{**mapping, "seed": seed} for seed in seeds]


def _config(path: Path, where: str, given: dict[str, Any]) -> TrainConfig:
    try:
        config = make_config(given)
        check_values(config)
    except UserError as error:
        raise UserError(f"{path}: {where}: {error}") from None
    return config
