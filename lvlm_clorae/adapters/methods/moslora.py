"""MoSLoRA: LoRA with a trained r x r mixer between its factors (Wu, Wang, Zhao and Wong, EMNLP 2024).

    y = W0 x + (alpha / r) B M A x

The mixer combines every pair of rank-one subspaces; plain LoRA has M = I. The paper initializes it with a
Kaiming-uniform or an orthogonal matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlm_clorae.adapters.config import AdapterConfig
from lvlm_clorae.adapters.inplace import GradientAdder, add_product
from lvlm_clorae.adapters.layer import Adapter, AdapterOutput, Task, linear_weight
from lvlm_clorae.adapters.model import AdapterModel
from lvlm_clorae.adapters.register import AdapterMethod


@dataclass
class MoSLoRAConfig(AdapterConfig):
    """Configuration of :class:`MoSLoRAModel`; ``init_mixer`` is ``kaiming`` (uniform) or ``orthogonal``."""

    peft_type: str = "MOSLORA"
    init_mixer: str = "kaiming"

    def validate(self) -> None:
        super().validate()
        if self.init_mixer not in ("kaiming", "orthogonal"):
            raise ValueError(f'init_mixer must be "kaiming" or "orthogonal", not "{self.init_mixer}".')


class MoSLoRAFactors(Adapter):
    """``A [r, d_in]``, ``B [d_out, r]`` and ``mixer [r, r]`` of one adapter at one layer."""

    dict_name = "moslora_factors"
    config: MoSLoRAConfig

    def __init__(self, d_in: int, d_out: int, config: MoSLoRAConfig) -> None:
        super().__init__(d_in, d_out, config)
        self.A = linear_weight(config.r, d_in)
        self.B = nn.Parameter(torch.zeros(d_out, config.r))
        self.mixer = linear_weight(config.r, config.r)
        if config.init_mixer == "orthogonal":
            nn.init.orthogonal_(self.mixer)

    def forward(
        self, output: Tensor, x: Tensor, task: Task, valid: Tensor | None = None, adder: GradientAdder | None = None
    ) -> AdapterOutput:
        """See :class:`Adapter`: the task is ignored, and there is neither an auxiliary loss nor a gate."""
        dtype = self.compute_dtype(x)
        dropped = functional.dropout(x.to(dtype), self.config.lora_dropout, self.training)
        mixed = dropped @ self.A.to(dtype).T @ self.mixer.to(dtype).T
        return add_product(output, self.config.scaling * mixed, self.B.to(dtype)), None, None

    def delta_weight(self) -> Tensor:
        """Return (alpha / r) B M A, ``[d_out, d_in]``."""
        return self.config.scaling * (self.B @ self.mixer @ self.A)


class MoSLoRAModel(AdapterModel):
    """A model with MoSLoRA layers, made by ``peft.get_peft_model(model, MoSLoRAConfig(...))``."""

    prefix: str = "moslora_"
    adapter_cls = MoSLoRAFactors


METHOD = AdapterMethod("moslora", MoSLoRAConfig, MoSLoRAModel, lambda common, run, tasks: MoSLoRAConfig(**common))
