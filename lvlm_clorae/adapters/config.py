"""The fields that all our adapter methods share with PEFT's LoRA, under the same names and meanings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig


@dataclass
class AdapterConfig(PeftConfig):
    """What a method that adapts linear layers needs whatever the method.

    Args:
        r: rank.
        lora_alpha: the adapter's output is scaled by ``lora_alpha / r`` (Eq. 8). By default ``r``, a scale of one
            whatever the rank; a method may have another. The paper does not give its value.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead (rank-stabilised LoRA).
        lora_dropout: probability of the dropout mask on x.
        target_modules: names, a regular expression or ``"all-linear"``; by default the attention query and value
            projections, from PEFT's own table by model type (``q``, ``v`` in T5; ``q_proj``, ``v_proj`` in LLaMA).
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: indices of the layers to adapt; by default all.
        layers_pattern: name of the module list that holds the layers, where it is not a common one.
        modules_to_save: modules trained in full and saved with the adapter.

    Raises:
        ValueError: a rank below 1, dropout outside [0, 1), settings that contradict each other.
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
        self.check()
        if self.lora_alpha is None:
            self.lora_alpha = self.default_alpha()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, set | tuple):
                setattr(self, name, sorted(value))

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied by."""
        assert self.lora_alpha is not None  # resolved at construction
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def default_alpha(self) -> float:
        """``lora_alpha`` where it is not given: an expert begins at the scale of LoRA with ``lora_alpha = 2 r``."""
        return 2 * self.r * self.sharing()

    def sharing(self) -> int:
        """The number of experts among which a gate shares, 1 without one: it begins even, each at 1/number."""
        return 1

    def check(self) -> None:
        """Raises ValueError for values that cannot be; a method adds its own."""
        if self.r < 1:
            raise ValueError(f"The rank must be at least 1: r={self.r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is a probability in [0, 1): {self.lora_dropout}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: set layers_to_transform too.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform does not work where target_modules is a string: list the names.")


def checked_tasks(tasks: Any) -> list[str]:
    """The names of tasks as a list. Raises ValueError where there are none, or one is empty or stands twice."""
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ValueError('The names of the tasks are missing, e.g. tasks=["mner", "mre", "mee"].')
    if any(not isinstance(task, str) or not task for task in names):
        raise ValueError(f"Task names are non-empty strings, not {names}.")
    if len(set(names)) < len(names):
        raise ValueError(f"A task has one name of its own, but one stands twice in tasks={names}.")
    return names
