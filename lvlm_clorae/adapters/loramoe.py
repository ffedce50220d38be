"""LoRAMoE: E LoRA experts under a softmax router, with a localised balancing loss (Dou et al., ACL 2024).

    y = W0 x + sum_i g_i (alpha / r) B_i A_i x,    g = softmax(G x)

The task decides nothing in the forward; in training it says which experts are meant for a sample (losses/balance.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlm_clorae.losses.balance import balance, importance
from lvlm_clorae.losses.mutual_information import at_least_fp32

from .config import AdapterConfig, checked_tasks
from .inplace import InputTap, add_product
from .layer import Adapter, AdapterLayer
from .model import GatedModel, rows_task_index


@dataclass
class LoRAMoEConfig(AdapterConfig):
    """Configuration of :class:`LoRAMoEModel`.

    ``lora_alpha`` is ``2 r * num_experts`` by default: the router begins by giving each expert an even share, and so
    each begins at LoRA's scale of two.

    Args:
        tasks: names of the sample types; expert i is of the group of task ``i % len(tasks)``.
        num_experts: by default two a task.
        expert_r: rank of an expert; by default all together have ``2 r``, as C-LoRAE's universal and task experts
            have, so that the same ``r`` gives the same number of parameters (the paper's Table 5).
        use_balance: have the balancing loss.
        balance_delta: how much more an expert of the sample's own type counts, in [0, 1).

    Raises:
        ValueError: as :class:`AdapterConfig`; no tasks, fewer experts than tasks, a rank below 1, ``balance_delta``.
    """

    tasks: list[str] = field(default_factory=list)
    num_experts: int | None = None
    expert_r: int | None = None
    use_balance: bool = True
    balance_delta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LORAMOE"
        self.num_experts = self._number()
        if self.expert_r is None:
            self.expert_r = max(1, round(2 * self.r / self.num_experts))

    def _number(self) -> int:
        return 2 * len(self.tasks) if self.num_experts is None else self.num_experts

    def sharing(self) -> int:
        return self._number()

    def check(self) -> None:
        super().check()
        self.tasks = checked_tasks(self.tasks)
        if self.num_experts is not None and self.num_experts < len(self.tasks):
            raise ValueError(f"Each of the {len(self.tasks)} tasks needs an expert: num_experts={self.num_experts}.")
        if self.expert_r is not None and self.expert_r < 1:
            raise ValueError(f"An expert's rank must be at least 1: expert_r={self.expert_r}.")
        if not 0.0 <= self.balance_delta < 1.0:
            raise ValueError(f"balance_delta is in [0, 1): {self.balance_delta}.")


class LoRAMoEExperts(Adapter):
    """``A [E, r_e, d_in]``, ``B [E, d_out, r_e]`` and ``router [E, d_in]`` of one adapter at one layer."""

    config: LoRAMoEConfig

    def __init__(self, d_in: int, d_out: int, config: LoRAMoEConfig) -> None:
        super().__init__(d_in, d_out, config)
        n, r_e = config.num_experts, config.expert_r
        assert n is not None  # the config resolves both
        assert r_e is not None
        self.has_side_loss = config.use_balance
        self.A = nn.Parameter(torch.empty(n, r_e, d_in))
        self.B = nn.Parameter(torch.empty(n, d_out, r_e))
        self.router = nn.Parameter(torch.empty(n, d_in))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and the router Kaiming-uniform(a=sqrt 5) as linear layers are, B zero: the start is the base model."""
        for matrix in self.A:  # one by one: of a 3-D tensor torch would take r_e * d_in for the fan-in
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    def forward(
        self,
        output: Tensor,
        x: Tensor,
        task: int | Tensor | None,
        valid: Tensor | None = None,
        tap: InputTap | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :class:`Adapter`; for the side loss Z ``[E]``, and W = E gate weights. The router sees x undropped.

        Raises:
            ValueError: in training with ``use_balance``, no task, or rows that do not match the batch.
        """
        config, dtype = self.config, self.compute_dtype(x)
        tokens = x.to(dtype)
        dropped = functional.dropout(tokens, config.lora_dropout, self.training)
        g = at_least_fp32(functional.linear(tokens, self.router.to(dtype))).softmax(-1)  # [B, ..., E]

        z = functional.linear(dropped, self.A.flatten(0, 1).to(dtype)).unflatten(-1, self.A.shape[:2])
        weighted = (config.scaling * g.to(dtype)).unsqueeze(-1) * z  # [B, ..., E, r_e]
        output = add_product(output, weighted.flatten(-2), self.B.transpose(0, 1).flatten(1).to(dtype))

        Z = None
        if config.use_balance and self.training:
            own = self._own(task, x)
            Z = importance(g, own, config.balance_delta, valid) if torch.is_grad_enabled() else None
        return output, Z, g.detach()

    def _own(self, task: int | Tensor | None, x: Tensor) -> Tensor:
        """True where an expert's group is the sample's task, ``[E]``, or ``[B, 1 ..., E]`` for an index a row."""
        tasks = self.config.tasks
        if task is None:
            raise ValueError(
                f"No task is set, and the balancing loss needs it: call model.set_task(...). Tasks: {', '.join(tasks)}."
            )
        groups = torch.arange(len(self.router), device=x.device) % len(tasks)
        if isinstance(task, Tensor):
            rows = rows_task_index(task, x.shape[0], tasks).to(x.device)
            return groups == rows.reshape(-1, *[1] * (x.dim() - 1))
        return groups == task


class LoRAMoELayer(AdapterLayer):
    """A frozen linear layer and its LoRAMoE adapters."""

    adapter_cls = LoRAMoEExperts
    adapter_layer_names = ("loramoe_experts",)


class LoRAMoEModel(GatedModel):
    """A model with LoRAMoE layers. Made by ``peft.get_peft_model(model, LoRAMoEConfig(...))``.

    ``PeftModel`` passes unknown attributes on, so both calls reach this class.

        model.set_task("mner")
        loss = model(**batch).loss + beta * model.balance_loss()
    """

    prefix: str = "loramoe_"
    tuner_layer_cls = LoRAMoELayer

    def balance_loss(self, sum_over_ranks: Callable[[Tensor], Tensor] | None = None, ranks: int = 1) -> Tensor:
        """The localised balancing loss of the last forward, a scalar: mean over the adapted layers.

        Args:
            sum_over_ranks: given a tensor ``[L, E]``, returns its sum over the data-parallel ranks. The loss is then
                that of all ranks' tokens together, equal on all, and its gradient such that the average over ranks, as
                data parallelism takes it, is the gradient of that loss.
            ranks: their number

        Like ``mutual_information_loss``, a zero without gradient where nothing was recorded.

        Raises:
            RuntimeError: see :meth:`side_terms`.
        """
        recorded = self.side_terms("balance")
        if not recorded:
            return torch.zeros((), device=next(self.model.parameters()).device)
        Z = torch.stack([term.to(recorded[0][0].device) for term, _ in recorded])
        if sum_over_ranks is None:
            return balance(Z).mean()
        own = Z.detach()
        loss = balance(Z + (sum_over_ranks(own.clone()) - own)).mean()
        return loss * ranks - loss.detach() * (ranks - 1)

    def gate_statistics(self) -> dict[str, Tensor]:
        """Per adapted layer, the router's mean weights over the valid tokens of its last forward, ``[E]``, detached."""
        weights = {name: layer.mean_gate_weights() for name, layer in self.adapted_layers().items()}
        return {name: weight for name, weight in weights.items() if weight is not None}
