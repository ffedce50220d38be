"""Configuration fields that our adapter methods share; those of PEFT's LoRA have the same names and meanings."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig

MAX_RANK = 1 << 16


@dataclass
class AdapterConfig(PeftConfig):
    """Base configuration of a method that adapts linear layers.

    Args:
        r: rank.
        lora_alpha: the adapter's output is scaled by ``lora_alpha / r`` (Eq. 8). Default: ``2 r`` times the number of
            experts among which the gate shares its weight, so that each starts at LoRA's usual scale of two. The paper
            does not give its value.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead (rank-stabilised LoRA).
        lora_dropout: dropout probability of the adapter's input.
        target_modules: names, a regular expression or ``"all-linear"``. Default: the attention query and value
            projections from PEFT's table by model type (``q``, ``v`` in T5; ``q_proj``, ``v_proj`` in LLaMA).
        exclude_modules: names or a regular expression of modules that are not adapted.
        layers_to_transform: indices of the layers to adapt. Default: all.
        layers_pattern: name of the module list that holds the layers, if it is not a common one.
        modules_to_save: modules that are trained in full and saved with the adapter.

    Raises:
        ValueError: a value of another type or out of range, or two settings that contradict each other.
    """

    r: int = 8
    lora_alpha: float | None = None
    use_rslora: bool = False
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate()
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r * self.gated_experts()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, set | tuple):
                setattr(self, name, sorted(value))

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output."""
        assert self.lora_alpha is not None  # set by __post_init__
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def gated_experts(self) -> int:
        """Number of experts that share the gate's weight, 1 without a gate."""
        return 1

    def validate(self) -> None:
        """Raise ValueError for invalid values; methods extend it."""
        self.require("r", f"an integer from 1 to {MAX_RANK}", lambda r: 1 <= r <= MAX_RANK, int)
        for name in (one.name for one in fields(self) if isinstance(one.default, bool)):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false.")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            is_pattern = isinstance(value, str) and name in ("target_modules", "exclude_modules")
            if not (value is None or is_pattern or _are_names([value] if isinstance(value, str) else value)):
                raise ValueError(f"{name} must be a list of module names.")
        if not (self.layers_to_transform is None or _are_indices(self.layers_to_transform)):
            raise ValueError("layers_to_transform must be a list of layer indices.")
        if self.lora_alpha is not None:
            self.require("lora_alpha", "a finite number above 0", lambda alpha: 0 < alpha < math.inf)
        self.require("lora_dropout", "a number in [0, 1)", lambda p: 0 <= p < 1)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: set it too.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs a list of target_modules, not a string: list the names.")

    def require(self, name: str, wanted: str, valid: Callable[..., bool], types: Any = (int, float)) -> None:
        """Raise ValueError unless the field ``name`` is of one of these types, no bool, and ``valid``."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, types) or not valid(value):
            raise ValueError(f"{name}={reprlib.repr(value)} must be {wanted}.")


def _are_names(values: object) -> bool:
    """Return whether these are module names. PEFT puts some of them into regular expressions, unescaped."""
    return isinstance(values, list | tuple | set) and all(
        isinstance(n, str) and re.fullmatch(r"[\w.]+", n) for n in values
    )


def _are_indices(values: object) -> bool:
    return all(type(index) is int for index in (values if isinstance(values, list | tuple) else [values]))


@dataclass
class TaskConfig(AdapterConfig):
    """Base configuration of a method that knows tasks.

    Args:
        tasks: task names in the order of their indices, e.g. ``["mner", "mre", "mee"]``.
    """

    tasks: list[str] = field(default_factory=list)

    def validate(self) -> None:
        super().validate()
        self.tasks = [self.tasks] if isinstance(self.tasks, str) else self.tasks
        if not isinstance(self.tasks, list | tuple):
            raise ValueError(f"tasks must be a list of names, not a {type(self.tasks).__name__}.")
        self.tasks = list(self.tasks)
        if not self.tasks:
            raise ValueError('The task names are missing, e.g. tasks=["mner", "mre", "mee"].')
        if not all(isinstance(task, str) and task for task in self.tasks) or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"Task names must be distinct, non-empty strings: tasks={reprlib.repr(self.tasks)}.")


@dataclass
class ExpertConfig(TaskConfig):
    """Base configuration of a method with task experts; ``expert_r`` is the rank of one."""

    expert_r: int | None = None

    def validate(self) -> None:
        super().validate()
        if self.expert_r is not None:
            self.require("expert_r", f"an integer from 1 to {MAX_RANK}", lambda r: 1 <= r <= MAX_RANK, int)
