"""MTL-LoRA: a transformation of each task between shared factors (Yang et al., AAAI 2025, arXiv 2410.09437).

    y = W0 x + (alpha / r) sum_i s_i B_i L_t A x,    s = softmax(w_t / tau)

A task t has a matrix L_t [r, r], which starts as the identity, and weights w_t of the n shared up-projections B_i. As
in the released code L_t is a full matrix, and the output is scaled by alpha / r, which the paper's equation leaves out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlm_clorae.adapters.config import TaskConfig
from lvlm_clorae.adapters.inplace import GradientAdder, add_product
from lvlm_clorae.adapters.layer import Adapter, AdapterOutput, Task, linear_weight
from lvlm_clorae.adapters.model import TaskModel, expand_task_index
from lvlm_clorae.adapters.register import AdapterMethod
from lvlm_clorae.losses.mutual_information import at_least_fp32


@dataclass
class MTLLoRAConfig(TaskConfig):
    """Configuration of :class:`MTLLoRAModel`.

    Args:
        num_up_projections: number of shared up-projections.
        temperature: tau; small values make each task choose one up-projection. Both defaults are those of the released
            script for LLaMA 2.
    """

    peft_type: str = "MTLLORA"
    num_up_projections: int = 3
    temperature: float = 0.1

    def validate(self) -> None:
        super().validate()
        self.require("num_up_projections", "an integer of at least 1", lambda n: n >= 1, int)
        self.require("temperature", "a finite number above 0", lambda tau: 0 < tau < float("inf"))


class MTLLoRAFactors(Adapter):
    """Parameters of one adapter at one layer, for T tasks and n up-projections.

    ``A [r, d_in]``, ``B [n, d_out, r]``, ``task_transform [T, r, r]`` and ``task_mixture [T, n]``, the weights w.
    """

    dict_name = "mtllora_factors"
    config: MTLLoRAConfig

    def __init__(self, d_in: int, d_out: int, config: MTLLoRAConfig) -> None:
        super().__init__(d_in, d_out, config)
        r, n, tasks = config.r, config.num_up_projections, len(config.tasks)
        self.A = linear_weight(r, d_in)
        self.B = nn.Parameter(torch.zeros(n, d_out, r))
        self.task_transform = nn.Parameter(torch.eye(r).repeat(tasks, 1, 1))
        self.task_mixture = linear_weight(tasks, n)

    def forward(
        self, output: Tensor, x: Tensor, task: Task, valid: Tensor | None = None, adder: GradientAdder | None = None
    ) -> AdapterOutput:
        """See :class:`Adapter`; there is neither an auxiliary loss nor a gate."""
        config, dtype = self.config, self.compute_dtype(x)
        if task is None:
            raise ValueError(f"No task is set: call model.set_task(...) before the forward. Tasks: {config.tasks}.")
        if isinstance(task, Tensor):
            task = expand_task_index(task, len(x), config.tasks).to(x.device)
        shares = (at_least_fp32(self.task_mixture) / config.temperature).softmax(-1).to(dtype)[task]  # [n] or [B, n]
        transform, B = self.task_transform[task].to(dtype), self.B.to(dtype)
        z = functional.dropout(x.to(dtype), config.lora_dropout, self.training) @ self.A.to(dtype).T
        z = config.scaling * (z.reshape(len(x), -1, z.shape[-1]) @ transform.mT)  # [B, S, r]
        if isinstance(task, Tensor):
            z = (shares[:, None, :, None] * z.unsqueeze(-2)).flatten(-2)  # [B, S, n r]
            return add_product(output, z, B.transpose(0, 1).flatten(1)), None, None
        return add_product(output, z, torch.tensordot(shares, B, 1)), None, None

    def delta_weight(self) -> Tensor:
        """See :class:`Adapter`."""
        raise NotImplementedError("MTL-LoRA cannot be merged: its change of the weight depends on the task.")


class MTLLoRAModel(TaskModel):
    """A model with MTL-LoRA layers, made by ``peft.get_peft_model(model, MTLLoRAConfig(tasks=..., ...))``."""

    prefix: str = "mtllora_"
    adapter_cls = MTLLoRAFactors


METHOD = AdapterMethod(
    "mtllora",
    MTLLoRAConfig,
    MTLLoRAModel,
    lambda common, run, tasks: MTLLoRAConfig(**common, tasks=tasks),
    knows_tasks=True,
)
