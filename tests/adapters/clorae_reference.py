"""Equations (3)-(8) and (5) of the paper, as they are printed: U and D d_out wide, one product after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lvlm_clorae.adapters.clorae import CLoRAEConfig, CLoRAEExperts

TASKS = ["mner", "mre", "mee"]
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
    mim: Tensor | None
    gate: Tensor | None


def plain_clorae(
    p: dict[str, Tensor], x: Tensor, dropped: Tensor, n: int, config: CLoRAEConfig, valid: Tensor | None = None
) -> Reference:
    """x, dropped ``[..., d_in]``; valid ``[...]``. The log term's variance floor is spelled out here as well."""
    U = D = g = mim = None
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
    if config.use_mim:  # (5)
        teacher = U.detach() if config.mim_detach_teacher else U
        variance = functional.softplus(p["mim_rho"]) + config.mim_s_min**2
        density = (teacher - p["mim_scale"] * D) ** 2 / (2 * variance) + variance.log() / 2
        mim = density.mean() if valid is None else density[valid].mean()
    return Reference(delta, mim, g)


def random_experts(seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> CLoRAEExperts:
    """Experts of which every parameter is away from its start, B, gate, m and rho too."""
    config = CLoRAEConfig(**{"tasks": TASKS, "r": 4, "lora_alpha": 6, **fields})
    experts = CLoRAEExperts(D_IN, D_OUT, config).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return experts.to(dtype)


def apply(experts: CLoRAEExperts, x: Tensor, task: int | Tensor | None, valid: Tensor | None = None):
    """The layer's delta on top of a base output of zeros, its MIM term and its gate's weight of the task expert."""
    output = torch.zeros(*x.shape[:-1], experts.d_out, dtype=x.dtype)
    output, mim, weight = experts(output, x, task, valid)
    return output, mim, None if weight is None else weight.squeeze(-1)


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters_of(experts: CLoRAEExperts) -> dict[str, Tensor]:
    """A second set of leaves with the same values, for the reference's own gradients."""
    return {name: value.detach().clone().requires_grad_() for name, value in experts.named_parameters()}
