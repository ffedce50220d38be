"""What the tuners of all our methods do: put layers into a model, tell them task and masks, collect what they give."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .config import AdapterConfig
from .context import ForwardContext, StackMasks, reads_encoder_states
from .layer import NO_MERGE, AdapterLayer, linear_features


class AdapterModel(BaseTuner):
    """A model with adapted linear layers. A method gives ``prefix`` and ``tuner_layer_cls``."""

    tuner_layer_cls: ClassVar[type[AdapterLayer]]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # by its call, not its forward as in older PEFT: hooks read the masks

    def adapted_layers(self) -> dict[str, AdapterLayer]:
        """The adapted layers by name."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, self.tuner_layer_cls)}

    def _pre_injection_hook(self, model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
        self._context = ForwardContext()
        self._masks: dict[str, StackMasks] = {}  # a stack's name -> what it was last called with
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._context.begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._context.end, always_call=True),
        ]

    def _prepare_adapter_config(self, peft_config: AdapterConfig, model_config: dict[str, Any]) -> AdapterConfig:
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
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        try:
            linear_features(target)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__} cannot adapt {current_key}: {error}. Check target_modules."
            ) from None
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, self._context)
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

    def unload(self) -> nn.Module:
        """The bare base model, without layers and hooks."""
        bare = super().unload()
        self._remove_hooks()
        return bare

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model with the adapters merged into its weights, without layers and hooks; arguments as in PEFT."""
        merged = super().merge_and_unload(*args, **kwargs)
        self._remove_hooks()  # where merging raised they are needed still
        return merged

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()


class GatedModel(AdapterModel):
    """Methods whose layers have a gate: they know tasks, have a side loss, and cannot be merged."""

    def set_task(self, task: str | int | Tensor) -> None:
        """Choose the task of every forward (and its recomputation in backward) until it is set again.

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

    @contextmanager
    def task_kept(self) -> Iterator[None]:
        """Whatever task is chosen inside, afterwards it is the one before."""
        before = self._context.tasks
        try:
            yield
        finally:
            self._context.tasks = before

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

    def side_terms(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """What the layers gave for the side loss in the last forward, each with its number of valid tokens.

        Args:
            name: of the side loss, for the messages

        Raises:
            RuntimeError: no forward yet; or reentrant activation checkpointing, under which a layer's side output has
                no graph.
        """
        if not self._context.seen_forward:
            raise RuntimeError(f"The {name} term belongs to a forward: call the model first.")
        if self._context.side_without_graph:
            raise RuntimeError(
                "Layers ran without gradients inside a forward with gradients, as reentrant activation checkpointing "
                f"makes them: their {name} term has no graph. Use "
                'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )
        return self._context.side_terms

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__}: {NO_MERGE}")

    def unmerge_adapter(self) -> None:
        raise NotImplementedError(f"{type(self).__name__}: {NO_MERGE}")

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__}: {NO_MERGE}")


def rows_task_index(task: Tensor, batch: int, tasks: list[str]) -> Tensor:
    """An index a row of the batch, from one a sample: beam search repeats each row in place.

    Raises:
        ValueError: the batch is no multiple of the rows.
    """
    beams, rest = divmod(batch, len(task))
    if rest:
        raise ValueError(
            f"set_task was given {len(task)} rows, but the batch has {batch}, which is no multiple. "
            f"Tasks: {', '.join(tasks)}."
        )
    return task.repeat_interleave(beams)
