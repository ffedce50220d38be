"""The C-LoRAE tuner: mutual-information loss, gate statistics, and adding tasks."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lvlm_clorae.adapters.context import AuxTerm
from lvlm_clorae.adapters.model import AuxLossModel, SumOverRanks
from lvlm_clorae.losses.mutual_information import mutual_information

from .config import CLoRAEConfig
from .experts import CLoRAEExperts


class CLoRAEModel(AuxLossModel):
    """A model with C-LoRAE layers, made by ``peft.get_peft_model(model, CLoRAEConfig(...))``.

    ``PeftModel`` passes unknown attributes on, so these methods can be called on it:

        model.set_task("mner")
        loss = model(**batch).loss + beta * model.mutual_information_loss()
    """

    prefix: str = "clorae_"
    adapter_cls = CLoRAEExperts
    mutual_information_loss = AuxLossModel.aux_loss
    """The MIM term (Eq. 5) of the last forward: its mean over the adapted layers."""

    def _reduce_terms(self, terms: list[AuxTerm], sum_over_ranks: SumOverRanks, ranks: int) -> Tensor:
        """Compute the terms of layers of equal shape together.

        They are recomputed in backward, since the stacked weights would take more memory than what the layers save.
        """
        groups: dict[tuple[object, ...], list[AuxTerm]] = {}
        for term in terms:
            key = (term.tokens.device, id(term.config), *(tensor.shape for tensor in term.tensors))
            groups.setdefault(key, []).append(term)
        settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
        parts = [checkpoint(_stacked, *group, **settings) for group in groups.values()]
        device = parts[0].device
        losses = torch.cat([part.to(device) for part in parts])
        if ranks > 1:  # each rank's mean over its tokens becomes its share of the mean over all ranks' tokens
            tokens = torch.stack([term.tokens.to(device) for group in groups.values() for term in group])
            losses = losses * tokens * ranks / sum_over_ranks(tokens.clone()).clamp(min=1)
        return losses.mean()

    def parameter_counts(self, adapter_name: str = "default") -> dict[str, int]:
        """Return the numbers of parameters of an adapter: ``universal``, ``experts``, ``gate`` and ``mim``."""
        counts = {"universal": 0, "experts": 0, "gate": 0, "mim": 0}
        for name, parameter in self.model.named_parameters():
            if f".clorae_experts.{adapter_name}." in name:
                part = name.rpartition(".")[2].split("_")[0].replace("expert", "experts")
                counts[part] += getattr(parameter, "ds_shape", parameter.shape).numel()  # ZeRO-3 empties the own shape
        return counts

    def add_task(
        self, name: str, init_from: str | None = None, adapter_name: str = "default", freeze_others: bool = False
    ) -> None:
        """Add a task expert to every layer of an adapter, last in the order.

        Call it before the optimizer (and DeepSpeed's engine) is created: the stacked parameters are replaced.

        Args:
            init_from: task whose expert is copied. Default: a newly initialized expert, which adds nothing at first.
            freeze_others: train the new expert alone. Everything else stops requiring gradients, and the other tasks
                become ``frozen_tasks`` of the adapter's configuration.

        Raises:
            ValueError: the name is taken, blank or no string, ``init_from`` or the adapter is unknown, or there are no
                experts.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f'There is no adapter "{adapter_name}". Adapters: {", ".join(self.peft_config)}.')
        config = self.peft_config[adapter_name]
        if not config.use_experts:
            raise ValueError("use_experts is off: this adapter has no task experts.")
        if not isinstance(name, str) or not name.strip() or name in config.tasks:
            raise ValueError(f'"{name}" cannot be a new task. Tasks: {", ".join(config.tasks)}.')
        source = None if init_from is None else cast(int, self._task_index(init_from, config.tasks))
        if freeze_others:
            config.frozen_tasks = list(config.tasks)
            self.model.requires_grad_(False)
        config.tasks.append(name)
        for layer in self.adapted_layers().values():
            if adapter_name in layer.adapters:
                cast(CLoRAEExperts, layer.adapters[adapter_name]).add_expert(source, trainable=freeze_others)
        self._context.tasks = {}


def _stacked(*terms: AuxTerm) -> Tensor:
    """Return the terms of layers of equal shape, ``[L]``."""
    config = cast(CLoRAEConfig, terms[0].config)
    stacked = map(torch.stack, zip(*((*term.tensors, term.tokens) for term in terms), strict=True))
    return mutual_information(*stacked, s_min=config.mim_s_min, detach_teacher=config.mim_detach_teacher)
