"""HydraLoRA: one shared A and E up-projections under a softmax router (Tian, Shi, Guo, Li and Xu, NeurIPS 2024).

    y = W0 x + (alpha / r) sum_i g_i B_i A x,    g = softmax(W_g x)

The router alone chooses among the up-projections, so the task is not used. All share one dropout mask of x; in the
released code each has its own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlm_clorae.adapters.config import AdapterConfig
from lvlm_clorae.adapters.inplace import GradientAdder, add_product
from lvlm_clorae.adapters.layer import Adapter, AdapterOutput, Task, linear_weight
from lvlm_clorae.adapters.model import AdapterModel
from lvlm_clorae.adapters.register import AdapterMethod
from lvlm_clorae.losses.mutual_information import at_least_fp32


@dataclass
class HydraLoRAConfig(AdapterConfig):
    """Configuration of :class:`HydraLoRAModel`.

    ``num_experts`` is the number of up-projections, and ``lora_alpha`` defaults to ``2 r`` times it. The paper finds
    the number by clustering the training samples; a run of this package has one for each task.
    """

    peft_type: str = "HYDRALORA"
    num_experts: int = 3

    def gated_experts(self) -> int:
        return self.num_experts

    def validate(self) -> None:
        super().validate()
        self.require("num_experts", "an integer of at least 1", lambda n: n >= 1, int)


class HydraLoRAFactors(Adapter):
    """``A [r, d_in]``, ``B [E, d_out, r]`` and ``router [E, d_in]`` of one adapter at one layer."""

    dict_name = "hydralora_factors"
    config: HydraLoRAConfig

    def __init__(self, d_in: int, d_out: int, config: HydraLoRAConfig) -> None:
        super().__init__(d_in, d_out, config)
        self.A = linear_weight(config.r, d_in)
        self.B = nn.Parameter(torch.zeros(config.num_experts, d_out, config.r))
        self.router = linear_weight(config.num_experts, d_in)

    def forward(
        self, output: Tensor, x: Tensor, task: Task, valid: Tensor | None = None, adder: GradientAdder | None = None
    ) -> AdapterOutput:
        """See :class:`Adapter`: the task is ignored; the gate has W = E weights. The router reads x without dropout."""
        config, dtype = self.config, self.compute_dtype(x)
        tokens = x.to(dtype)
        g = at_least_fp32(functional.linear(tokens, self.router.to(dtype))).softmax(-1)  # [B, ..., E]
        z = functional.dropout(tokens, config.lora_dropout, self.training) @ self.A.to(dtype).T
        weighted = (config.scaling * g.to(dtype)).unsqueeze(-1) * z.unsqueeze(-2)  # [B, ..., E, r]
        B = self.B.transpose(0, 1).flatten(1).to(dtype)
        return add_product(output, weighted.flatten(-2), B), None, g.detach()


class HydraLoRAModel(AdapterModel):
    """A model with HydraLoRA layers, made by ``peft.get_peft_model(model, HydraLoRAConfig(...))``."""

    prefix: str = "hydralora_"
    adapter_cls = HydraLoRAFactors


def _make_config(common: dict[str, Any], run: Any, tasks: list[str]) -> HydraLoRAConfig:
    return HydraLoRAConfig(**common, num_experts=len(tasks))


METHOD = AdapterMethod("hydralora", HydraLoRAConfig, HydraLoRAModel, _make_config)
