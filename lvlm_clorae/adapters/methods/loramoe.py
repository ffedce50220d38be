"""LoRAMoE: E LoRA experts under a softmax router, with a localized balancing loss (Dou et al., ACL 2024).

    y = W0 x + sum_i g_i (alpha / r) B_i A_i x,    g = softmax(G x)

The task does not change the forward. In training it selects the experts that the balancing loss favours for a sample
(``losses/balance.py``). All experts share one dropout mask of x; in the released code each has its own.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlm_clorae.adapters.config import ExpertConfig
from lvlm_clorae.adapters.context import AuxTerm
from lvlm_clorae.adapters.inplace import GradientAdder, add_product
from lvlm_clorae.adapters.layer import Adapter, AdapterOutput, Task, linear_weight
from lvlm_clorae.adapters.model import AuxLossModel, SumOverRanks, expand_task_index
from lvlm_clorae.adapters.register import AdapterMethod
from lvlm_clorae.losses.balance import balance, importance, moments, token_sums
from lvlm_clorae.losses.mutual_information import at_least_fp32


@dataclass
class LoRAMoEConfig(ExpertConfig):
    """Configuration of :class:`LoRAMoEModel`.

    Expert i is in the group of task ``i % len(tasks)``. ``lora_alpha`` defaults to ``2 r * num_experts``, since the
    router starts by giving the experts about equal shares. ``expert_r`` defaults to ranks that sum to ``2 r``, as those
    of C-LoRAE's universal and task experts, so that the same ``r`` gives the same number of parameters (Table 5).

    Args:
        num_experts: number of experts. Default: two per task.
        use_balance: use the balancing loss.
        balance_delta: extra weight of the experts of a sample's own task, in [0, 1).

    Raises:
        ValueError: no tasks, fewer experts than tasks, or a value out of range.
    """

    peft_type: str = "LORAMOE"
    num_experts: int | None = None
    use_balance: bool = True
    balance_delta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_experts = self.gated_experts()
        self.expert_r = self.expert_r or max(1, round(2 * self.r / self.num_experts))

    def gated_experts(self) -> int:
        return 2 * len(self.tasks) if self.num_experts is None else self.num_experts

    def validate(self) -> None:
        super().validate()
        if self.num_experts is not None:
            wanted = "an integer, at least one per task and at most 1024"
            self.require("num_experts", wanted, lambda n: len(self.tasks) <= n <= 1024, int)
        self.require("balance_delta", "a number in [0, 1)", lambda delta: 0 <= delta < 1)


class LoRAMoEExperts(Adapter):
    """``A [E, r_e, d_in]``, ``B [E, d_out, r_e]`` and ``router [E, d_in]`` of one adapter at one layer."""

    dict_name = "loramoe_experts"
    config: LoRAMoEConfig
    groups: Tensor

    def __init__(self, d_in: int, d_out: int, config: LoRAMoEConfig) -> None:
        super().__init__(d_in, d_out, config)
        n, r_e = config.gated_experts(), config.expert_r
        assert r_e is not None  # set by the config
        self.has_aux_loss = config.use_balance
        self.A = linear_weight(n, r_e, d_in)
        self.B = nn.Parameter(torch.zeros(n, d_out, r_e))
        self.router = linear_weight(n, d_in)
        self.register_buffer("groups", torch.arange(n) % len(config.tasks), persistent=False)

    def forward(
        self, output: Tensor, x: Tensor, task: Task, valid: Tensor | None = None, adder: GradientAdder | None = None
    ) -> AdapterOutput:
        """See :class:`Adapter`; there are W = E gate weights.

        The auxiliary term's tensors are the arguments of :func:`importance` for this layer, each ``[B, E]``.

        The router reads x without dropout. A training forward with ``use_balance`` needs a task.
        """
        config, dtype = self.config, self.compute_dtype(x)
        tokens = x.to(dtype)
        dropped = functional.dropout(tokens, config.lora_dropout, self.training)
        g = at_least_fp32(functional.linear(tokens, self.router.to(dtype))).softmax(-1)  # [B, ..., E]

        z = functional.linear(dropped, self.A.flatten(0, 1).to(dtype)).unflatten(-1, self.A.shape[:2])
        weighted = (config.scaling * g.to(dtype)).unsqueeze(-1) * z  # [B, ..., E, r_e]
        output = add_product(output, weighted.flatten(-2), self.B.transpose(0, 1).flatten(1).to(dtype))

        aux = None
        if config.use_balance and self.training and torch.is_grad_enabled():
            sums = token_sums(g, valid)
            aux = sums, self._own_experts(task, x).expand_as(sums)
        return output, aux, g.detach()

    def _own_experts(self, task: Task, x: Tensor) -> Tensor:
        """Return True where an expert's group is the sample's task, ``[E]``, or ``[B, E]`` for an index per row."""
        tasks = self.config.tasks
        if task is None:
            raise ValueError(
                f"No task is set, and the balancing loss needs it: call model.set_task(...). Tasks: {tasks}."
            )
        if isinstance(task, Tensor):
            task = expand_task_index(task, len(x), tasks).to(x.device).unsqueeze(-1)
        return self.groups == task


class LoRAMoEModel(AuxLossModel):
    """A model with LoRAMoE layers, made by ``peft.get_peft_model(model, LoRAMoEConfig(...))``."""

    prefix: str = "loramoe_"
    adapter_cls = LoRAMoEExperts
    balance_loss = AuxLossModel.aux_loss
    """The sum of the balancing losses of the layers, in which the samples of all ranks form one matrix."""

    def _reduce_terms(self, terms: list[AuxTerm], sum_over_ranks: SumOverRanks, ranks: int) -> Tensor:
        """Compute the moments of layers of equal shape together; other ranks' are added without a gradient."""
        groups: dict[tuple[object, ...], list[AuxTerm]] = {}
        for term in terms:
            groups.setdefault((term.tokens.device, id(term.config), term.tensors[0].shape), []).append(term)
        parts = [_stacked(*group).to(terms[0].tokens.device) for group in groups.values()]
        local = torch.cat(parts)
        others = sum_over_ranks(local.detach().clone()) - local.detach()
        loss = balance(local + others).sum().float()
        return loss * ranks - loss.detach() * (ranks - 1)


def _stacked(*terms: AuxTerm) -> Tensor:
    """Return the moments of layers of equal shape, ``[L, 3]``."""
    sums, own = map(torch.stack, zip(*(term.tensors for term in terms), strict=True))
    return moments(importance(sums, own, cast(LoRAMoEConfig, terms[0].config).balance_delta))


def _make_config(common: dict[str, Any], run: Any, tasks: list[str]) -> LoRAMoEConfig:
    return LoRAMoEConfig(**common, tasks=tasks, expert_r=run.lora_expert_rank, use_balance=run.beta > 0)


# Per layer the ranks sum three moments in float64
METHOD = AdapterMethod(
    "loramoe", LoRAMoEConfig, LoRAMoEModel, _make_config, knows_tasks=True, aux_loss="balance", aux_numbers=6
)
