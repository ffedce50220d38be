"""The C-LoRAE tuner: its layers, its side loss, its gate's statistics, and tasks that come later."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from lvlm_clorae.adapters.layer import AdapterLayer
from lvlm_clorae.adapters.model import GatedModel

from .experts import CLoRAEExperts


class CLoRAELayer(AdapterLayer):
    """A frozen linear layer and its C-LoRAE adapters: y = W0 x + (alpha / r) h (Eq. 8), summed over the active ones."""

    adapter_cls = CLoRAEExperts
    adapter_layer_names = ("clorae_experts",)


class CLoRAEModel(GatedModel):
    """A model with C-LoRAE layers. Made by ``peft.get_peft_model(model, CLoRAEConfig(...))``.

    ``PeftModel`` passes unknown attributes on, so ``model.set_task(...)`` reaches this class.

        model.set_task("mner")
        loss = model(**batch).loss + beta * model.mutual_information_loss()
    """

    prefix: str = "clorae_"
    tuner_layer_cls = CLoRAELayer

    def mutual_information_loss(self, mean_counts: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The MIM term (Eq. 5) of the last forward, a scalar: mean over the adapted layers. Add it, times beta.

        Args:
            mean_counts: given the valid tokens of each layer ``[L]``, returns their mean over the data-parallel ranks.
                Each rank's term is then scaled so that the average over ranks is the mean over all ranks' tokens
                together, however unequal their padding. By default each rank takes the mean over its own tokens.

        The terms are computed in training mode with gradients enabled. Otherwise, and with ``use_mim`` off, this is a
        zero without gradient, so that one training loop serves all ablations.

        Raises:
            RuntimeError: see :meth:`side_terms`.
        """
        recorded = self.side_terms("mutual-information")
        if not recorded:
            return torch.zeros((), device=next(self.model.parameters()).device)
        device = recorded[0][0].device
        terms = torch.stack([term.to(device) for term, _ in recorded])
        if mean_counts is not None:
            counts = torch.stack([count.to(device) for _, count in recorded])
            terms = terms * counts / mean_counts(counts.clone()).clamp(min=1)
        return terms.mean()

    def gate_statistics(self) -> dict[str, Tensor]:
        """Per adapted layer, the mean over the valid tokens of its last forward of the weight on the task expert.

        Returns:
            layer name -> detached scalar in [0, 1]; layers that have no gate or have not run are absent. After
            ``generate`` the encoder's layers speak of the input, the decoder's of the last step only.
        """
        weights = {name: layer.mean_gate_weights() for name, layer in self.adapted_layers().items()}
        return {name: weight.squeeze(-1) for name, weight in weights.items() if weight is not None}

    def parameter_counts(self, adapter_name: str = "default") -> dict[str, int]:
        """Parameters of an adapter: ``universal``, ``experts``, ``gate``, and, used in training only, ``mim``."""
        counts = dict.fromkeys(("universal", "experts", "gate", "mim"), 0)
        kinds = {"universal": "universal", "expert": "experts", "gate": "gate", "mim": "mim"}
        for layer in self.adapted_layers().values():
            if adapter_name in layer.adapters:
                for name, parameter in layer.adapters[adapter_name].named_parameters():
                    # Under ZeRO-3 a parameter's own shape is empty and the true one beside it.
                    shape = getattr(parameter, "ds_shape", parameter.shape)
                    counts[kinds[name.split("_")[0]]] += shape.numel()
        return counts

    def add_task(
        self, name: str, init_from: str | None = None, adapter_name: str = "default", freeze_others: bool = False
    ) -> None:
        """Give every layer of an adapter one more task expert, the last in the order.

        Call it before the optimizer (and DeepSpeed's engine) is made: the stacked parameters are replaced.

        Args:
            name: the new task's
            init_from: the task whose expert is copied; by default a fresh expert, which adds nothing at first
            freeze_others: train the new expert alone: everything else stops requiring gradients, and the other tasks
                become ``frozen_tasks`` of the adapter's configuration

        Raises:
            ValueError: the name is taken or empty, ``init_from`` or the adapter is unknown, or there are no experts.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f'There is no adapter "{adapter_name}". Adapters: {", ".join(self.peft_config)}.')
        config = self.peft_config[adapter_name]
        if not config.use_experts:
            raise ValueError("use_experts is off: this adapter has no task experts to add one to.")
        if name in config.tasks or not name:
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
