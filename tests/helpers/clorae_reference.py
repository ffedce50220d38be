"""Equations (3)-(8) and (5) of the paper as printed: U and D with all output channels, one product after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lvlm_clorae.adapters.methods.clorae import CLoRAEConfig, CLoRAEExperts
from lvlm_clorae.losses.mutual_information import mutual_information
from tests.helpers.adapters import TASKS

D_IN, D_OUT = 7, 5

ABLATIONS = {
    "full": {},
    "universal only": {"use_experts": False},
    "experts only": {"use_universal": False},
    "no gate": {"use_gate": False},
    "no mim": {"use_mim": False},
    "teacher not detached": {"mim_detach_teacher": False},
    "expert_r": {"expert_r": 3},
}


class Reference(NamedTuple):
    delta: Tensor
    density: Tensor | None
    gate: Tensor | None


def plain_clorae(p: dict[str, Tensor], x: Tensor, dropped: Tensor, n: int, config: CLoRAEConfig) -> Reference:
    """Return delta ``[..., d_out]``, the MIM term of each token ``[...]`` and the gate ``[..., 2]``."""
    U = D = g = density = None
    if config.use_universal:
        U = dropped @ p["universal_A"].T @ p["universal_B"].T  # (3)
    if config.use_experts:
        D = dropped @ p["expert_A"][n].T @ p["expert_B"][n].T  # (4)
    if config.use_gate:
        g = (x @ p["gate"].T).softmax(-1)  # (6)
        h = g[..., :1] * U + g[..., 1:] * D  # (7)
    else:
        h = sum(part for part in (U, D) if part is not None)
    delta = config.lora_alpha / config.r * h  # (8)
    if config.use_mim:  # (5), with the floor of the variance
        teacher = U.detach() if config.mim_detach_teacher else U
        variance = functional.softplus(p["mim_rho"]) + config.mim_s_min**2
        density = ((teacher - p["mim_scale"] * D) ** 2 / (2 * variance) + variance.log() / 2).sum(-1)
    return Reference(delta, density, g)


def random_experts(seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> CLoRAEExperts:
    """Return experts with random parameters, B, gate, m and rho included."""
    config = CLoRAEConfig(**{"tasks": TASKS, "r": 4, "lora_alpha": 6, **fields})
    experts = CLoRAEExperts(D_IN, D_OUT, config).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return experts.to(dtype)


def apply(experts: CLoRAEExperts, x: Tensor, task: int | Tensor | None, valid: Tensor | None = None):
    """Return the layer's delta, its MIM term and its gate's weight of the task expert, or None."""
    output = torch.zeros(*x.shape[:-1], experts.d_out, dtype=x.dtype)
    output, aux, weight = experts(output, x, task, valid)
    mim = None
    if aux is not None:
        number = torch.tensor(float(x.shape[:-1].numel() if valid is None else valid.sum()))
        tensors, config = [tensor.unsqueeze(0) for tensor in (*aux, number)], experts.config
        mim = mutual_information(*tensors, s_min=config.mim_s_min, detach_teacher=config.mim_detach_teacher)[0]
    return output, mim, None if weight is None else weight.squeeze(-1)


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters_of(experts: CLoRAEExperts) -> dict[str, Tensor]:
    """Return new leaves with the same values, for the reference's own gradients."""
    return {name: value.detach().clone().requires_grad_() for name, value in experts.named_parameters()}
