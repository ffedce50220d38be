"""What a C-LoRAE adapter is made of: the fields of ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig


@dataclass
class CLoRAEConfig(PeftConfig):
    """Configuration of :class:`CLoRAEModel`.

    Args:
        tasks: names of the task experts, in the order of their indices, e.g. ``["mner", "mre", "mee"]``.
        r: rank of the universal expert.
        expert_r: rank of each task expert; by default ``max(1, round(r / len(tasks)))``.
        lora_alpha: both experts are scaled by ``lora_alpha / r`` (Eq. 8). By default ``r``, a scale of one whatever the
            rank, as in PEFT's own LoRA; the paper does not give its value.
        lora_dropout: probability of the one dropout mask on x that both experts see; the gate sees x undropped.
        target_modules: names, a regular expression or ``"all-linear"``; by default the attention query and value
            projections, from PEFT's own table by model type (``q``, ``v`` in T5; ``q_proj``, ``v_proj`` in LLaMA).
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: indices of the layers to adapt; by default all.
        layers_pattern: name of the module list that holds the layers, where it is not a common one.
        modules_to_save: modules trained in full and saved with the adapter.
        use_universal, use_experts: have the universal expert, the task experts. With only one of them there is nothing
            to weigh and nothing to inform, so ``use_gate`` and ``use_mim`` become False.
        use_gate: weigh the experts by the token gate (Eqs. 6-7); without it h = U + D.
        use_mim: have the mutual-information term (Eq. 5). Its parameters get a gradient only from
            ``mutual_information_loss()``: switch it off where that is not part of the loss.
        mim_detach_teacher: no gradient from the MIM term into the universal expert, the teacher.
        mim_s_min: floor of the MIM term's standard deviation s, in (0, 1); see ``losses/mutual_information.py``.

    Raises:
        ValueError: no tasks, a task twice or unnamed, a rank below 1, dropout outside [0, 1), no expert at all.
    """

    tasks: list[str] = field(default_factory=list)
    r: int = 8
    expert_r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    use_universal: bool = True
    use_experts: bool = True
    use_gate: bool = True
    use_mim: bool = True
    mim_detach_teacher: bool = True
    mim_s_min: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "CLORAE"
        self.tasks = [self.tasks] if isinstance(self.tasks, str) else list(self.tasks)
        self._check_values()
        if self.expert_r is None:
            self.expert_r = max(1, round(self.r / len(self.tasks)))
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if not (self.use_universal and self.use_experts):
            self.use_gate = self.use_mim = False
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, set | tuple):
                setattr(self, name, sorted(value))

    def _check_values(self) -> None:
        if not self.tasks:
            raise ValueError('CLoRAEConfig needs the names of its tasks, e.g. tasks=["mner", "mre", "mee"].')
        if any(not isinstance(task, str) or not task for task in self.tasks):
            raise ValueError(f"Task names are non-empty strings, not {self.tasks}.")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"Each task has one expert, but a name stands twice in tasks={self.tasks}.")
        if self.r < 1:
            raise ValueError(f"The universal expert's rank must be at least 1: r={self.r}.")
        if self.expert_r is not None and self.expert_r < 1:
            raise ValueError(f"A task expert's rank must be at least 1: expert_r={self.expert_r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is a probability in [0, 1): {self.lora_dropout}.")
        if not 0.0 < self.mim_s_min < 1.0:
            raise ValueError(f"mim_s_min is the floor of a deviation that starts at 1, in (0, 1): {self.mim_s_min}.")
        if not (self.use_universal or self.use_experts):
            raise ValueError("use_universal and use_experts are both off: nothing is left to train.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: set layers_to_transform too.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform does not work where target_modules is a string: list the names.")
