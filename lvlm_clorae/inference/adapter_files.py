"""Read an adapter's configuration and weights, checked against its base before the base's weights are loaded.

The files may be damaged or made to do harm: nothing is unpickled, and nothing is allocated whose size they alone state.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from torch import Tensor

from lvlm_clorae.adapters.config import AdapterConfig
from lvlm_clorae.adapters.register import AdapterMethod, adapter_method
from lvlm_clorae.adapters.state import check_weights, resolve_patterns
from lvlm_clorae.files import parse_json
from lvlm_clorae.inference.adapter_directory import SCHEMA, WEIGHTS
from lvlm_clorae.models.loading import describe_model

CONFIG = "adapter_config.json"
_WEIGHT_OPTIONS = ("dtype", "load_in_8bit", "load_in_4bit")


def read_adapter(path: Path, schema: Mapping[str, Any]) -> tuple[peft.PeftConfig, dict[str, Tensor]]:
    """Return the configuration, with lists for patterns, and the weights on the CPU.

    Raises:
        UserError: there is no such method or base
        ValueError, TypeError, OSError, RuntimeError, SafetensorError: an invalid file, or weights that do not fit
    """
    config = read_config(path / CONFIG, adapter_method(schema["adapter"]))
    if getattr(config, "tasks", schema["tasks"]) != schema["tasks"]:
        raise ValueError(f"{CONFIG} has other tasks than {SCHEMA}: {reprlib.repr(config.tasks)}, {schema['tasks']}")
    options = schema.get("base_options", {}).items()
    base = describe_model(schema["base"], **{name: value for name, value in options if name not in _WEIGHT_OPTIONS})
    resolve_patterns(config, (name for name, _ in base.named_modules() if name))
    with torch.device("meta"):
        model = peft.get_peft_model(base, config)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: list(weight.shape) for name, weight in state.items()}
    with safe_open(path / WEIGHTS, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        check_weights(shapes, expected)
        for name in expected:
            if shapes[name] != expected[name]:
                raise ValueError(f"{name} is {shapes[name]} in the file and {expected[name]} by its configuration")
        weights = {name: file.get_tensor(name) for name in shapes}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
    return config, weights


def read_config(path: Path, method: AdapterMethod) -> peft.PeftConfig:
    """Read PEFT's ``adapter_config.json``. Raises ValueError, TypeError or OSError if it is invalid."""
    given = parse_json(path.read_bytes())
    if not isinstance(given, dict):
        raise ValueError(f"{path.name} must be a JSON object")
    if given.get("peft_type") != method.name.upper():
        raise ValueError(
            f"{path.name} is not of the method {method.name}: peft_type is {str(given.get('peft_type'))[:40]}"
        )
    if issubclass(method.config_cls, peft.LoraConfig):
        _check_lora(given)
    given |= {"inference_mode": True, "base_model_name_or_path": None}  # PEFT warns of a base that has moved
    return peft.PeftConfig.from_peft_type(**given)


def _check_lora(given: dict[str, Any]) -> None:
    """Raise ValueError for what our methods refuse, which PEFT does not check, and for settings that we never write."""
    shared = {field.name for field in fields(AdapterConfig)}
    AdapterConfig(**{name: value for name, value in given.items() if name in shared})
    defaults = peft.LoraConfig().to_dict()
    for name in given.keys() - shared:
        if given[name] != defaults.get(name):
            raise ValueError(f"{CONFIG}: {name[:60]} is not supported")


def check_stored_size(path: Path) -> None:
    """Raise ValueError if a whole model's configuration describes far more weights than its files hold.

    Tied weights are stored once and may be described twice.
    """
    stored = 0
    for part in sorted(path.glob("*.safetensors")):
        with safe_open(part, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored += torch.Size(file.get_slice(name).get_shape()).numel()
    described = sum(weight.numel() for weight in describe_model(str(path)).parameters())
    if described > 2 * stored:
        raise ValueError(f"config.json describes {described} weights, and the files hold {stored}")
