"""Load the configuration of a run: defaults < recipe of the model preset < DeepSpeed file < YAML file < flags.

pydantic checks types, ranges and choices by the annotations in config.py. Flags are read with argparse, since
jsonargparse and tyro do not accept all of ``--use_gate``, ``--use_gate false`` and ``--no_use_gate``, and do not
suggest the nearest name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError

from lvlm_clorae.arguments import Parser, suggestion
from lvlm_clorae.errors import UserError, located, nearest
from lvlm_clorae.models.presets import preset_recipe
from lvlm_clorae.training.config import FIELDS, GROUPS, TrainConfig

DEEPSPEED_SECTION = "lvlm_clorae"
"""Section of a DeepSpeed file with settings of a run."""
DEEPSPEED_FILES = Path(__file__).parents[1] / "ds_configs"

_TYPES = get_type_hints(TrainConfig)
_NOTE = "Flags may be written with - or _; a boolean as --name, --name false or --no_name; no value as null."


def load_config(argv: list[str] | None = None, prog: str = "train.py") -> TrainConfig:
    """Load the configuration from a command line.

    Raises:
        UserError: an unknown name, an invalid value, or a YAML file that cannot be read.
    """
    parser = Parser(
        prog=prog,
        description="Fine-tune a vision-language model for multimodal information extraction with C-LoRAE.",
        epilog=_NOTE,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags take precedence")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    add_settings(parser, GROUPS)
    arguments = vars(parser.parse_args(argv))
    path = arguments.get("config")
    given = _read_settings(Path(path)) if path else {}
    with located(path):
        _build(given)
    return make_config({**given, **settings_of(arguments)})


def make_config(given: Mapping[str, Any]) -> TrainConfig:
    """Build the configuration from settings, over those of the DeepSpeed file, the recipe and the defaults.

    Raises UserError as :func:`load_config`.
    """
    given = {**_deepspeed_settings(given.get("deepspeed", FIELDS["deepspeed"].default)), **given}
    return _build({**preset_recipe(str(given.get("model", FIELDS["model"].default))), **given})


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
    for name, value in values.items():
        if isinstance(value, bool) and bool not in (_TYPES[name], *get_args(_TYPES[name])):
            raise UserError(f"{name} = {value}: a boolean is not valid. Set --{name} to another value.")
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise _user_error(error) from None


def _user_error(error: ValidationError) -> UserError:
    """Convert pydantic's errors about the first invalid setting to one line."""
    problems = error.errors(include_url=False)
    name, value = str(problems[0]["loc"][0]), problems[0]["input"]
    choices = _choices(name)
    if choices and all(problem["type"] in ("literal_error", "bool_parsing") for problem in problems):
        return UserError(f'{name} = "{value}" is not a valid choice.{nearest(str(value), choices)}')
    if problems[0]["type"] == "value_error":
        return UserError(f"{name}: {problems[0]['ctx']['error']}")
    messages = [problem["msg"] for problem in problems if problem["loc"][0] == name]
    reasons = dict.fromkeys(message.removeprefix("Input ").partition(",")[0] for message in messages)
    return UserError(f"{name} = {str(value)[:80]}: {' or '.join(reasons)}. Change --{name}.")


def add_settings(parser: Parser, groups: Iterable[type]) -> None:
    """Add a flag for every setting of ``groups``, each in a titled argument group."""
    for group in groups:
        target = parser.add_argument_group(str(group.__doc__).strip(". "))
        for item in dataclasses.fields(group):
            _add_flag(target, item)


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among parsed arguments, with ``null`` as None."""
    return {name: None if value == "null" else value for name, value in arguments.items() if name in FIELDS}


def _add_flag(target: Any, item: dataclasses.Field[Any]) -> None:
    hint, choices = _TYPES[item.name], _choices(item.name)
    text = item.metadata["help"].replace("%", "%%")
    if item.default not in (None, dataclasses.MISSING):
        text += f" (default: {str(item.default).lower() if isinstance(item.default, bool) else item.default})"
    if hint is bool:
        target.add_argument(f"--{item.name}", nargs="?", const="true", metavar="true|false", help=text)
        negative = {"dest": item.name, "action": "store_const", "const": "false", "help": argparse.SUPPRESS}
        target.add_argument(f"--no_{item.name}", **negative)
    elif get_origin(hint) is list:
        target.add_argument(f"--{item.name}", nargs="*", metavar="NAME", help=text)
    else:
        metavar = "|".join(choices) if choices else _plain(hint).__name__.upper()
        target.add_argument(f"--{item.name}", metavar=metavar, help=text)


def _plain(hint: Any) -> Any:
    """Return the type of an annotation without ``None`` and bounds."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    return _plain(parts[0]) if parts else hint


def _choices(name: str) -> tuple[str, ...]:
    """Return the words that a setting accepts; none if it is not a choice."""
    hint = _TYPES[name]
    parts = (hint, *get_args(hint))
    words = [str(word) for part in parts if get_origin(part) is Literal for word in get_args(part)]
    return (*words, *(("true", "false") if words and bool in parts else ()))


def find_deepspeed_file(name: str) -> Path:
    """Return the path of a DeepSpeed file, given as a path or as the name of a packaged file, such as ``zero2``."""
    path = Path(name)
    packaged = DEEPSPEED_FILES / f"{path.stem}.json"
    by_name = name in (path.stem, f"ds_configs/{path.stem}.json")
    return packaged if by_name and not path.is_file() and packaged.is_file() else path


def _deepspeed_settings(name: object) -> dict[str, Any]:
    """Return the settings in a DeepSpeed file. Errors are left to :func:`read_deepspeed_file`."""
    try:
        content = json.loads(find_deepspeed_file(str(name)).read_text(encoding="utf-8"))
        return dict(content[DEEPSPEED_SECTION])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice; ``-`` and ``_`` are equal in keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f'"{key.value}" is given twice', problem_mark=key.start_mark)
            seen.add(name)
        return node


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file. Raises UserError, which calls the content ``what``, if it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: the {what} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the {what} is not valid YAML ({' '.join(str(error).split())}).") from None


def _read_settings(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "configuration")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: the configuration must be a mapping of settings to values.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}
