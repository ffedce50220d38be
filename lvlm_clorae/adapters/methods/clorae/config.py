"""Configuration of C-LoRAE adapters: the fields of ``adapter_config.json``."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field

from lvlm_clorae.adapters.config import ExpertConfig


@dataclass
class CLoRAEConfig(ExpertConfig):
    """Configuration of :class:`CLoRAEModel`; ``r`` is the universal expert's rank.

    Both experts have the same scale (Eq. 8) and read x under one dropout mask; the gate reads x without dropout.
    ``lora_alpha`` defaults to ``4 r`` with a gate, which starts by giving each expert one half, and to ``2 r`` without.
    ``expert_r`` defaults to ``max(1, round(r / len(tasks)))``.

    Args:
        frozen_tasks: tasks whose experts get no gradient, see ``CLoRAEModel.add_task``.
        use_universal, use_experts: use the universal expert, the task experts. With only one of them, ``use_gate`` and
            ``use_mim`` become False.
        use_gate: weigh the experts by the token gate (Eqs. 6-7); without it h = U + D.
        use_mim: use the mutual-information term (Eq. 5). Its parameters get a gradient only from
            ``mutual_information_loss()``: switch it off if that is not part of the loss.
        mim_detach_teacher: no gradient from the MIM term to the universal expert, the teacher.
        mim_s_min: floor of the MIM term's standard deviation s, in (0, 1); see ``losses/mutual_information.py``.

    Raises:
        ValueError: no tasks, a repeated or empty task name, a value out of range, or no expert at all.
    """

    peft_type: str = "CLORAE"
    frozen_tasks: list[str] = field(default_factory=list)
    use_universal: bool = True
    use_experts: bool = True
    use_gate: bool = True
    use_mim: bool = True
    mim_detach_teacher: bool = True
    mim_s_min: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expert_r = self.expert_r or max(1, round(self.r / len(self.tasks)))

    def gated_experts(self) -> int:
        return 2 if self.use_gate else 1

    def validate(self) -> None:
        super().validate()
        if not (self.use_universal and self.use_experts):
            self.use_gate = self.use_mim = False
        if not (self.use_universal or self.use_experts):
            raise ValueError("use_universal and use_experts are both off: enable one of them.")
        if not (isinstance(self.frozen_tasks, list) and all(task in self.tasks for task in self.frozen_tasks)):
            raise ValueError(f"frozen_tasks={reprlib.repr(self.frozen_tasks)} are not all in tasks={self.tasks}.")
        self.require("mim_s_min", "a number in (0, 1), since s starts at 1", lambda s: 0 < s < 1)
