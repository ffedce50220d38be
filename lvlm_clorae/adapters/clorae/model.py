"""The C-LoRAE tuner: puts the layers into a model, tells them the task, and collects what they report."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .config import CLoRAEConfig
from .context import ForwardContext, StackMasks, reads_encoder_states
from .layer import NO_MERGE, CLoRAELayer, linear_features


class CLoRAEModel(BaseTuner):
    """A model with C-LoRAE layers. Made by ``peft.get_peft_model(model, CLoRAEConfig(...))``.

    ``PeftModel`` passes unknown attributes on, so ``model.set_task(...)`` reaches this class.

        model.set_task("mner")
        loss = model(**batch).loss + beta * model.mutual_information_loss()
    """

    prefix: str = "clorae_"
    tuner_layer_cls = CLoRAELayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # by its call, not its forward as in older PEFT: hooks read the masks

    # ---------------------------------------------------------------- use

    def set_task(self, task: str | int | Tensor) -> None:
        """Choose the task expert for every forward (and its recomputation in backward) until it is set again.

        Args:
            task: a task's name or index: one task for the batch, no device synchronisation; or a 1-D integer tensor
                with an index for each row. A batch may hold a multiple of these rows, each repeated in place (beams).

        The choice holds for every adapter that has the task, the active ones included.

        Raises:
            ValueError: an unknown name, an index out of range, a tensor that is not 1-D and integer.
        """
        chosen = {}
        for adapter, config in self.peft_config.items():
            try:
                chosen[adapter] = self._task_index(task, config.tasks)
            except ValueError:
                if adapter in self.active_adapters:
                    raise
        self._context.tasks = chosen

    def _task_index(self, task: str | int | Tensor, tasks: list[str]) -> int | Tensor:
        listed = ", ".join(f"{name} ({index})" for index, name in enumerate(tasks))
        if isinstance(task, str):
            if task not in tasks:
                raise ValueError(f'Unknown task "{task}". Tasks: {listed}.')
            return tasks.index(task)
        if isinstance(task, Tensor):
            if task.dim() != 1 or not len(task) or task.is_floating_point() or task.dtype == torch.bool:
                raise ValueError(
                    f"A task index a row is a 1-D integer tensor, not {task.dtype} {list(task.shape)}. Tasks: {listed}."
                )
            if int(task.min()) < 0 or int(task.max()) >= len(tasks):
                raise ValueError(f"Task index out of range in {task.tolist()}. Tasks: {listed}.")
            return task.to(next(self.model.parameters()).device, torch.long)
        index = operator.index(task)
        if not 0 <= index < len(tasks):
            raise ValueError(f"Task index {index} is out of range. Tasks: {listed}.")
        return index

    def mutual_information_loss(self, mean_counts: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The MIM term (Eq. 5) of the last forward, a scalar: mean over the adapted layers. Add it, times beta.

        Args:
            mean_counts: given the valid tokens of each layer ``[L]``, returns their mean over the data-parallel ranks.
                Each rank's term is then scaled so that the average over ranks is the mean over all ranks' tokens
                together, however unequal their padding. By default each rank takes the mean over its own tokens.

        The terms are computed in training mode with gradients enabled. Otherwise, and with ``use_mim`` off, this is a
        zero without gradient, so that one training loop serves all ablations.

        Raises:
            RuntimeError: no forward yet; or reentrant activation checkpointing, under which a layer's side output has
                no graph.
        """
        context = self._context
        if not context.seen_forward:
            raise RuntimeError("The mutual-information term belongs to a forward: call the model first.")
        if context.mim_without_graph:
            raise RuntimeError(
                "Layers ran without gradients inside a forward with gradients, as reentrant activation checkpointing "
                "makes them: their mutual-information term has no graph. Use "
                'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )
        if not context.mim_terms:
            return torch.zeros((), device=next(self.model.parameters()).device)
        device = context.mim_terms[0][0].device
        terms = torch.stack([term.to(device) for term, _ in context.mim_terms])
        if mean_counts is not None:
            counts = torch.stack([count.to(device) for _, count in context.mim_terms])
            terms = terms * counts / mean_counts(counts.clone()).clamp(min=1)
        return terms.mean()

    def gate_statistics(self) -> dict[str, Tensor]:
        """Per adapted layer, the mean over the valid tokens of its last forward of the weight on the task expert.

        Returns:
            layer name -> detached scalar in [0, 1]; layers that have no gate or have not run are absent. After
            ``generate`` the encoder's layers speak of the input, the decoder's of the last step only.
        """
        layers = [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, CLoRAELayer)]
        weights = {name: layer.mean_task_weight() for name, layer in layers}
        return {name: weight for name, weight in weights.items() if weight is not None}

    # ---------------------------------------------------------------- construction

    def _pre_injection_hook(self, model: nn.Module, config: CLoRAEConfig, adapter_name: str) -> None:
        self._context = ForwardContext()
        self._masks: dict[str, StackMasks] = {}  # a stack's name -> what it was last called with
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._context.begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._context.end, always_call=True),
        ]

    def _prepare_adapter_config(self, peft_config: CLoRAEConfig, model_config: dict[str, Any]) -> CLoRAEConfig:
        """Default target modules by model type, also of a subclass of a model that PEFT knows."""
        if peft_config.target_modules is None:
            for config_cls in type(getattr(self.model, "config", None)).__mro__:
                targets = self.target_module_mapping.get(getattr(config_cls, "model_type", ""))
                if targets is not None:
                    peft_config.target_modules = targets if isinstance(targets, str) else list(targets)
                    return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: CLoRAEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, CLoRAELayer):
            target.update_layer(adapter_name, peft_config)
            return
        try:
            linear_features(target)
        except TypeError as error:
            raise TypeError(f"C-LoRAE cannot adapt {current_key}: {error}. Check target_modules.") from None
        layer = CLoRAELayer(target, adapter_name, peft_config, self._context)
        layer.masks = self._masks_of(current_key)
        layer.reads_encoder = reads_encoder_states(current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # PEFT: a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _masks_of(self, name: str) -> StackMasks:
        """The masks of the innermost transformers model around the module: an encoder, a decoder, a language model."""
        stack_name = name
        while stack_name and not isinstance(self.model.get_submodule(stack_name), PreTrainedModel):
            stack_name = stack_name.rpartition(".")[0]
        if stack_name not in self._masks:
            stack = self.model.get_submodule(stack_name)  # "" is the model itself
            encoder_decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            is_decoder = encoder_decoder and stack is self.model.get_decoder()
            masks = self._masks[stack_name] = StackMasks(self._context, is_decoder)
            self._hooks.append(stack.register_forward_pre_hook(masks.read, with_kwargs=True))
        return self._masks[stack_name]

    # ---------------------------------------------------------------- what cannot be merged

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(NO_MERGE)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError(NO_MERGE)

    def unload(self) -> nn.Module:
        """The bare base model, without layers and hooks."""
        for hook in self._hooks:
            hook.remove()
        return super().unload()
