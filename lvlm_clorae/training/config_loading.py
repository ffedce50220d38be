"""Load the configuration of a run: defaults < recipe of the model preset < DeepSpeed file < YAML file < flags.

pydantic checks types, ranges and choices by the annotations in config.py. Flags are read with argparse, since
jsonargparse and tyro do not accept all of ``--use_gate``, ``--use_gate false`` and ``--no_use_gate``, and do not
suggest the nearest name.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError

from lvlm_clorae.adapters.register import method_names
from lvlm_clorae.arguments import Parser, suggestion
from lvlm_clorae.errors import UserError, located
from lvlm_clorae.files import unique
from lvlm_clorae.models.presets import preset_recipe, presets
from lvlm_clorae.training.config import FIELDS, GROUPS, PROJECTOR, WITHOUT_ADAPTER, TrainConfig
from lvlm_clorae.training.deepspeed_config import deepspeed_settings, find_deepspeed_file


def _parts(hint: Any) -> list[Any]:
    """Return the types, choices and bounds of an annotation; its type comes first."""
    inner = () if get_origin(hint) is list else get_args(hint)
    return [part for each in inner for part in _parts(each)] or [hint]


_PARTS = {name: _parts(hint) for name, hint in get_type_hints(TrainConfig, include_extras=True).items()}
_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "non-empty text", list[str]: "a list of names"}
_BOUNDS = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
ALIGNMENT: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 32,
    "loss_weighting": "none",
}
"""Recipe of adapter ``projector``, over that of the preset: LLaVA's first stage (arXiv 2310.03744, Table 9)."""
_PURPOSES = {
    "train.py": "Fine-tune a vision-language model for multimodal information extraction with C-LoRAE.",
    "lvlm-clorae align": "Train the projector between a vision tower and a language model, both frozen, on captions.",
}
_NOTE = """Flags may be written with - or _; a boolean as --name, --name false or --no_name; no value as null.

Recipes of the model presets, and of `lvlm-clorae align`, which override the defaults above:"""


def load_config(argv: list[str] | None = None, prog: str = "train.py") -> TrainConfig:
    """Load the configuration from a command line.

    Raises:
        UserError: an unknown name, an invalid value, or a YAML file that cannot be read.
    """
    named = {**{name: preset.recipe for name, preset in presets().items()}, "align": ALIGNMENT}
    recipes = (f"  {name}: {json.dumps(recipe)[1:-1]}" for name, recipe in named.items())
    parser = Parser(
        prog=prog,
        description=f"{_PURPOSES.get(prog, _PURPOSES['train.py'])}\n"
        "The recipe of a model preset overrides the defaults below; the end of this help lists the recipes.",
        epilog="\n".join([_NOTE, *recipes]),
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags take precedence")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    add_settings(parser, GROUPS)
    arguments = vars(parser.parse_args(argv))
    path = arguments.get("config")
    given = {} if path is None else _read_settings(Path(path))
    with located(path):
        _build(given)
    return make_config({**given, **settings_of(arguments)})


def make_config(given: Mapping[str, Any]) -> TrainConfig:
    """Build the configuration from settings, over those of the DeepSpeed file, the recipe and the defaults.

    Raises UserError as :func:`load_config`, also for the DeepSpeed file.
    """
    name = given.get("deepspeed", FIELDS["deepspeed"].default)
    if name and isinstance(name, str):  # others are refused below
        path = find_deepspeed_file(name)
        section = deepspeed_settings(path)
        with located(path):
            _build(section)
        given = {**section, **given}
    recipe = preset_recipe(str(given.get("model", FIELDS["model"].default)))
    return _build({**recipe, **(ALIGNMENT if given.get("adapter") == PROJECTOR else {}), **given})


def read_config(path: Path) -> TrainConfig:
    """Read the ``config.yaml`` of a run directory. Raises UserError as :func:`load_config`."""
    given = _read_settings(path)
    with located(path):
        return _build(given)


def check_names(names: Iterable[str]) -> None:
    """Raise UserError, with a suggestion, for the first name that is not a setting."""
    for name in names:
        if name not in FIELDS:
            hint = suggestion(name, FIELDS, prog="train.py")
            raise UserError(f'There is no setting "{name}".{hint}')


def _build(values: Mapping[str, Any]) -> TrainConfig:
    check_names(values)
    lists = {name for name, parts in _PARTS.items() if parts[0] == list[str]}
    values = {name: [value] if name in lists and isinstance(value, str) else value for name, value in values.items()}
    for name, value in values.items():
        if value == "" or (isinstance(value, bool) and "true" not in _choices(name)):
            raise _invalid(name, value)
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        raise _invalid(name, values[name]) from None


def _invalid(name: str, value: object) -> UserError:
    """Return the error for an invalid value of a setting, with the values that it accepts."""
    parts, choices = _PARTS[name], _choices(name)
    accepted = f"one of {', '.join(choices)}" if choices else _NAMES[parts[0]]
    bounds = [part for part in parts if type(part) in _BOUNDS]
    accepted += "".join(f", {_BOUNDS[type(bound)]} {getattr(bound, type(bound).__name__.lower())}" for bound in bounds)
    accepted += " or null" if type(None) in parts else ""
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    question = f' Did you mean "{close[0]}"?' if close else ""
    return UserError(f"{name} = {_shown(value)[:80]}: must be {accepted}.{question}")


def _shown(value: object) -> str:
    """Return a value as flags and YAML files have it."""
    return value if value and isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)


def add_settings(parser: Parser, groups: Iterable[type]) -> None:
    """Add a flag for every setting of ``groups``, each in a titled argument group."""
    for group in groups:
        target = parser.add_argument_group(str(group.__doc__).strip(". "))
        for item in dataclasses.fields(group):
            _add_flag(target, item)


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among parsed arguments, with ``null`` as None, or an empty list for a list."""
    return {k: None if v == "null" else [] if v == ["null"] else v for k, v in arguments.items() if k in FIELDS}


def _add_flag(target: Any, item: dataclasses.Field[Any]) -> None:
    choices, text = _choices(item.name), item.metadata["help"].replace("%", "%%")
    if item.default not in (None, dataclasses.MISSING):
        text += f" (default: {_shown(item.default)})"
    form: dict[str, Any] = {"metavar": "|".join(choices) or _PARTS[item.name][0].__name__.upper(), "help": text}
    if "true" in choices:
        form |= {"nargs": "?", "const": "true"}
        negative = {"dest": item.name, "action": "store_const", "const": "false", "help": argparse.SUPPRESS}
        target.add_argument(f"--no_{item.name}", **negative)
    elif get_origin(_PARTS[item.name][0]) is list:
        form |= {"nargs": "+", "metavar": "NAME"}
    target.add_argument(f"--{item.name}", **form)


def _choices(name: str) -> list[str]:
    """Return the words that a setting accepts; none if it is not a choice."""
    if name == "adapter":
        return [*method_names(), *WITHOUT_ADAPTER]
    return [part for part in _PARTS[name] if isinstance(part, str)] + ["true", "false"] * (bool in _PARTS[name])


MAX_VALUES = 10_000
"""Values of a YAML file."""


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice (``-`` and ``_`` are equal) and aliases that expand to many values."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        unique([(str(key.value).replace("-", "_"), value) for key, value in node.value])
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        nodes, count = [node] if node else [], 0
        while nodes and count <= MAX_VALUES:
            current = nodes.pop()
            if not isinstance(current, yaml.ScalarNode):
                is_mapping = isinstance(current, yaml.MappingNode)
                inner = [*chain.from_iterable(current.value)] if is_mapping else current.value
                nodes, count = nodes + inner, count + len(inner)
        if count > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values, with every alias expanded")
        return node


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file. Raises UserError, which calls the content ``what``, if it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: the {what} cannot be read ({error.strerror}).") from None
    except RecursionError:
        raise UserError(f"{path}: the {what} is not valid YAML (nested too deeply).") from None
    except Exception as error:  # PyYAML's constructors raise ValueError, IndexError, AttributeError and others
        raise UserError(f"{path}: the {what} is not valid YAML ({' '.join(str(error).split())}).") from None


def _read_settings(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "configuration")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: the configuration must be a mapping of settings to values.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}
