"""MoSLoRA: LoRA with a trained r x r mixer between its factors (Wu, Wang, Zhao and Wong, EMNLP 2024).

    y = W0 x + (alpha / r) B M A x

The mixer lets every pair of rank-one subspaces work together, where plain LoRA has M = I. The paper starts it from a
Kaiming-uniform or an orthogonal matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import AdapterConfig
from .inplace import InputTap, add_product
from .layer import Adapter, AdapterLayer
from .model import AdapterModel


@dataclass
class MoSLoRAConfig(AdapterConfig):
    """Configuration of :class:`MoSLoRAModel`.

    Args:
        init_mixer: ``kaiming`` (uniform) or ``orthogonal``.

    Raises:
        ValueError: as :class:`AdapterConfig`; another ``init_mixer``.
    """

    init_mixer: str = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "MOSLORA"

    def check(self) -> None:
        super().check()
        if self.init_mixer not in ("kaiming", "orthogonal"):
            raise ValueError(f'init_mixer is "kaiming" or "orthogonal", not "{self.init_mixer}".')


class MoSLoRAFactors(Adapter):
    """``A [r, d_in]``, ``B [d_out, r]`` and ``mixer [r, r]`` of one adapter at one layer."""

    config: MoSLoRAConfig

    def __init__(self, d_in: int, d_out: int, config: MoSLoRAConfig) -> None:
        super().__init__(d_in, d_out, config)
        self.A = nn.Parameter(torch.empty(config.r, d_in))
        self.B = nn.Parameter(torch.empty(d_out, config.r))
        self.mixer = nn.Parameter(torch.empty(config.r, config.r))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A Kaiming-uniform(a=sqrt 5) and B zero as in PEFT's LoRA: the start is the base model."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        if self.config.init_mixer == "orthogonal":
            nn.init.orthogonal_(self.mixer)
        else:
            nn.init.kaiming_uniform_(self.mixer, a=math.sqrt(5))

    def forward(
        self,
        output: Tensor,
        x: Tensor,
        task: int | Tensor | None,
        valid: Tensor | None = None,
        tap: InputTap | None = None,
    ) -> tuple[Tensor, None, None]:
        """See :class:`Adapter`: no task matters, and there is neither side loss nor gate."""
        dtype = self.compute_dtype(x)
        dropped = functional.dropout(x.to(dtype), self.config.lora_dropout, self.training)
        mixed = dropped @ self.A.to(dtype).T @ self.mixer.to(dtype).T
        return add_product(output, self.config.scaling * mixed, self.B.to(dtype)), None, None

    def delta_weight(self) -> Tensor:
        """(alpha / r) B M A, ``[d_out, d_in]``."""
        return self.config.scaling * (self.B @ self.mixer @ self.A)


class MoSLoRALayer(AdapterLayer):
    """A frozen linear layer and its MoSLoRA adapters."""

    adapter_cls = MoSLoRAFactors
    adapter_layer_names = ("moslora_factors",)


class MoSLoRAModel(AdapterModel):
    """A model with MoSLoRA layers. Made by ``peft.get_peft_model(model, MoSLoRAConfig(...))``."""

    prefix: str = "moslora_"
    tuner_layer_cls = MoSLoRALayer
