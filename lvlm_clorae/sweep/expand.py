"""Expand a sweep file into its runs, each with its configuration, name and run directory."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from lvlm_clorae.arguments import suggestion
from lvlm_clorae.errors import UserError, located
from lvlm_clorae.files import file_errors, write_text_atomic
from lvlm_clorae.training.checks import check_experts
from lvlm_clorae.training.config import FIELDS, TrainConfig
from lvlm_clorae.training.config_loading import check_names, make_config, read_yaml

KEYS = ("output_dir", "settings", "grid", "sweep_runs", "seeds")  # of a sweep file
OWN = ("output_dir", "resume_from_checkpoint")  # set for each run, so a sweep file cannot set them
MAX_NAME = 120  # characters of a run's name; a file system takes 255 bytes, and temporary files add to the name
_PLAIN = re.compile(r"[A-Za-z0-9._+-]{1,32}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    number: int  # index in the expansion, from 0
    varied: dict[str, Any]  # the settings that this run varies, the seed included
    config: TrainConfig  # with its run directory and automatic resuming

    @property
    def name(self) -> str:
        """Name of the run and of its directory."""
        return sweep_run_name(self.varied)

    @property
    def group(self) -> str:
        """The name without the seed, shared by all seeds. Empty if only the seed varies."""
        return sweep_run_name({key: value for key, value in self.varied.items() if key != "seed"})

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(str(self.config.output_dir))


@dataclass(frozen=True)
class Sweep:
    """An expanded sweep file: the runs of the grid, then the single ones, each with all its seeds in a row."""

    path: Path
    output_dir: Path
    sweep_runs: list[SweepRun]

    @property
    def keys(self) -> list[str]:
        """The settings that any run varies, except the seed, in the order of the configuration."""
        varied = {key for sweep_run in self.sweep_runs for key in sweep_run.varied}
        return [key for key in FIELDS if key in varied - {"seed"}]


def read_sweep(path: Path) -> Sweep:
    """Read and expand a sweep file.

    Raises:
        UserError: the file cannot be read, has an unknown key, or sets a value that the configuration refuses or that
            cannot be swept; or two runs have the same configuration
    """
    content = read_yaml(path, "sweep")
    with located(path):
        return _expand(path, content)


def _expand(path: Path, content: Any) -> Sweep:
    content = _known(content)
    output_dir, seeds = content.get("output_dir", f"runs/{path.stem}"), content.get("seeds")
    if not isinstance(output_dir, str) or not output_dir:
        raise UserError(f"output_dir must be a directory, but is {output_dir!r}.")
    if seeds is not None and not (isinstance(seeds, list) and seeds):
        raise UserError(f"seeds must be a list of integers, but is {seeds!r}.")
    shared = _settings("settings", content.get("settings"))
    sweep_runs: list[SweepRun] = []
    known: dict[str, str] = {}
    for where, mapping in [*_grid(content), *_single(content)] or [("settings", {})]:
        if seeds and "seed" in mapping:
            raise UserError(f"{where}: both seed and seeds are given. Remove one of them.")
        for seed in [{"seed": seed} for seed in seeds] if seeds else [{}]:
            varied = {**mapping, **seed}
            with located(where):
                config = make_config({**shared, **varied})
                check_experts(config)
            exact = {key: getattr(config, key) for key in (*varied, "seed")}
            name = sweep_run_name(exact)
            for same in (name, repr(config)):
                if same in known:
                    repeat = "Remove one of them; to repeat a run list seeds."
                    raise UserError(f"{where}: {name} is the same run as {known[same]}. {repeat}")
                known[same] = name
            config = replace(config, output_dir=str(Path(output_dir) / name), resume_from_checkpoint="auto")
            sweep_runs.append(SweepRun(len(sweep_runs), exact, config))
    return Sweep(path, Path(output_dir), sweep_runs)


def _known(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"a sweep is a mapping with any of the keys {', '.join(KEYS)}.")
    for key in map(str, content):
        if key.replace("-", "_") in FIELDS and key not in KEYS:
            raise UserError(f'"{key}" is a setting. Move it under settings, grid or sweep_runs.')
        if key not in KEYS:
            raise UserError(f'unknown key "{key}".{suggestion(key, KEYS)}')
    return {key: value for key, value in content.items() if value is not None}


def _settings(where: str, mapping: Any) -> dict[str, Any]:
    """Check a mapping of settings to values or lists of values; None has none."""
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, dict):
        raise UserError(f"{where} must be a mapping of settings, but is {mapping!r}.")
    named = {str(key).replace("-", "_"): value for key, value in mapping.items()}
    with located(where):
        for key in OWN:
            if key in named:
                raise UserError(f"{key} is set for each run. Set output_dir beside settings instead.")
        check_names(named)
    return named


def _grid(content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    grid = _settings("grid", content.get("grid"))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid: {key} must be a list of values, but is {values!r}.")
    return [("grid", dict(zip(grid, values, strict=True))) for values in product(*grid.values()) if grid]


def _single(content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    given = content.get("sweep_runs", [])
    if not isinstance(given, list):
        raise UserError(f"sweep_runs must be a list of mappings of settings, but is {given!r}.")
    places = (f"sweep_runs, number {number}" for number in range(1, len(given) + 1))
    return [(where, _settings(where, mapping)) for where, mapping in zip(places, given, strict=True)]


def write_arguments(sweep_run: SweepRun) -> list[str]:
    """Write the run's settings to ``<run directory>.yaml``. Returns the arguments of ``train.py`` that read them.

    Flags cannot express every value: null where the recipe has one, several lines, a name with a leading hyphen.
    """
    path = sweep_run.directory.with_name(sweep_run.name + ".yaml")
    with file_errors(f"{path}: cannot be written", "Choose another output_dir."):
        write_text_atomic(path, f"# {sweep_run.name}, by lvlm-clorae sweep expand\n{sweep_run.config.to_yaml()}")
    return ["--config", str(path), "--output_dir", str(sweep_run.directory), "--resume_from_checkpoint", "auto"]


def sweep_run_name(varied: Mapping[str, Any]) -> str:
    """Name a run by what it varies, for example ``lora_rank=64,lora_dropout=0.05,seed=1``.

    The name depends on no other run, so that values can be added to a sweep. Names differ if the settings differ: a
    value that is not safe in a file name, or would read as another value, is cut and followed by ``@`` and its hash.
    """
    order = sorted(varied, key=lambda key: (key == "seed", list(FIELDS).index(key)))
    name = ",".join(f"{key}={_text(key, varied[key])}" for key in order)
    if len(name) <= MAX_NAME:
        return name
    seed = f",seed={varied['seed']}" if "seed" in varied else ""
    return f"{name[: MAX_NAME - 40]}@{_hash(name)}{seed}"


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        plain = all(_PLAIN.fullmatch(item) and "+" not in item for item in value) and value != ["none"]
        return _short("+".join(value), value, plain)
    # "none" is a value of some settings (adapter) and the absence of one in others (vision)
    return _short(str(value), value, not (value == "none" and FIELDS[key].default is None))


def _short(text: str, value: Any, plain: bool) -> str:
    if plain and _PLAIN.fullmatch(text):
        return text
    return f"{_UNSAFE.sub('-', text)[:16]}@{_hash(json.dumps(value))}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]
