"""What a C-LoRAE adapter is made of: the fields of ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field

from lvlm_clorae.adapters.config import AdapterConfig, checked_tasks


@dataclass
class CLoRAEConfig(AdapterConfig):
    """Configuration of :class:`CLoRAEModel`; ``r`` is the universal expert's rank.

    Both experts are scaled alike (Eq. 8) and see x under one dropout mask; the gate sees x undropped.

    ``lora_alpha`` is ``4 r`` by default where there is a gate, which begins by giving either expert one half: so each
    begins at LoRA's scale of two (docs/testbed.md). Without a gate it is ``2 r``.

    Args:
        tasks: names of the task experts, in the order of their indices, e.g. ``["mner", "mre", "mee"]``.
        frozen_tasks: tasks whose experts get no gradient, see ``CLoRAEModel.add_task``.
        expert_r: rank of each task expert; by default ``max(1, round(r / len(tasks)))``.
        use_universal, use_experts: have the universal expert, the task experts. With only one of them there is nothing
            to weigh and nothing to inform, so ``use_gate`` and ``use_mim`` become False.
        use_gate: weigh the experts by the token gate (Eqs. 6-7); without it h = U + D.
        use_mim: have the mutual-information term (Eq. 5). Its parameters get a gradient only from
            ``mutual_information_loss()``: switch it off where that is not part of the loss.
        mim_detach_teacher: no gradient from the MIM term into the universal expert, the teacher.
        mim_tokens: of how many tokens, drawn anew in every layer and forward, the MIM term is estimated without bias;
            a few, since of these the experts' outputs are made, d_out wide. 0: of every token, of which they are not.
        mim_s_min: floor of the MIM term's standard deviation s, in (0, 1); see ``losses/mutual_information.py``.

    Raises:
        ValueError: no tasks, a task twice or unnamed, a rank below 1, a negative mim_tokens, dropout outside [0, 1), no
            expert at all.
    """

    tasks: list[str] = field(default_factory=list)
    frozen_tasks: list[str] = field(default_factory=list)
    expert_r: int | None = None
    use_universal: bool = True
    use_experts: bool = True
    use_gate: bool = True
    use_mim: bool = True
    mim_detach_teacher: bool = True
    mim_tokens: int = 0
    mim_s_min: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "CLORAE"
        if self.expert_r is None:
            self.expert_r = max(1, round(self.r / len(self.tasks)))
        if not (self.use_universal and self.use_experts):
            self.use_gate = self.use_mim = False

    def sharing(self) -> int:
        return 2 if self.use_gate and self.use_universal and self.use_experts else 1

    def check(self) -> None:
        super().check()
        self.tasks = checked_tasks(self.tasks)
        unknown = [task for task in self.frozen_tasks if task not in self.tasks]
        if unknown:
            raise ValueError(f"frozen_tasks names {unknown}, but tasks={self.tasks}.")
        if self.expert_r is not None and self.expert_r < 1:
            raise ValueError(f"A task expert's rank must be at least 1: expert_r={self.expert_r}.")
        if self.mim_tokens < 0:
            raise ValueError(f"mim_tokens counts tokens, 0 for all of them: {self.mim_tokens}.")
        if not 0.0 < self.mim_s_min < 1.0:
            raise ValueError(f"mim_s_min is the floor of a deviation that starts at 1, in (0, 1): {self.mim_s_min}.")
        if not (self.use_universal or self.use_experts):
            raise ValueError("use_universal and use_experts are both off: nothing is left to train.")
