"""Base classes of the tuners: inject layers into a model, pass them task and masks, collect their auxiliary terms."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import AdapterConfig
from .context import READS_ENCODER, AuxTerm, ForwardContext, StackMasks
from .layer import Adapter, AdapterLayer
from .state import check_weights, resolve_patterns

SumOverRanks = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over the data-parallel ranks; it may work in place."""


class AdapterModel(BaseTuner):
    """A model with adapted linear layers. A method sets ``prefix`` and ``adapter_cls``."""

    adapter_cls: ClassVar[type[Adapter]]
    tuner_layer_cls = AdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_state_dict)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # a call, not its forward as in older PEFT: hooks read the masks

    def adapted_layers(self) -> dict[str, AdapterLayer]:
        """The adapted layers by name."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, AdapterLayer)}

    def gate_statistics(self) -> dict[str, Tensor]:
        """Return the gate's mean weights over the valid tokens of the last forward, detached, by layer name.

        They are ``[W]``, and for C-LoRAE, whose W is 1, the scalar weight on the task expert. Layers without a gate or
        without a forward are absent. After ``generate`` the decoder's layers describe the last step only.
        """
        found = {}
        for name, layer in self.adapted_layers().items():
            if layer.gate_weights is not None:
                weights, valid = layer.gate_weights
                counted = torch.ones_like(weights[..., :1]) if valid is None else valid.unsqueeze(-1).float()
                mean = (weights * counted).flatten(0, -2).sum(0) / counted.sum().clamp(min=1)
                found[name] = mean.squeeze(-1)
        return found

    def _pre_injection_hook(self, model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
        self._context = ForwardContext()
        self._masks: dict[str, StackMasks] = {}  # by the stack's name
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._context.begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._context.end, always_call=True),
        ]

    def _prepare_adapter_config(self, peft_config: AdapterConfig, model_config: dict[str, Any]) -> AdapterConfig:
        """Set default target modules by model type, also for a subclass of a model that PEFT knows."""
        if peft_config.inference_mode:  # loaded from files that others may have written
            resolve_patterns(peft_config, (name for name, _ in self.model.named_modules() if name))
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
        if isinstance(target, AdapterLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear | Conv1D):  # bitsandbytes' layers are subclasses of nn.Linear
            raise TypeError(f"{current_key} is a {type(target).__name__}, not a linear layer. Check target_modules.")
        layer = AdapterLayer(target, self.adapter_cls, self._context)
        layer.update_layer(adapter_name, peft_config)
        layer.masks = self._masks_of(current_key)
        layer.reads_encoder = READS_ENCODER.search(current_key) is not None
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # PEFT trains a further adapter only after set_adapter
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

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the base model of ``unload`` and ``merge_and_unload``, without hooks."""
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model


def _check_state_dict(tuner: AdapterModel, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Raise ValueError if an adapter is loaded in part, which PEFT does without a word."""
    mark, keys = f".{tuner.adapter_cls.dict_name}.", [prefix + key for key in tuner.state_dict()]
    expected: set[str] = set()
    for name in tuner.peft_config:
        own = {key for key in keys if f"{mark}{name}." in key or f".modules_to_save.{name}." in key}
        expected |= own if own & state_dict.keys() else set()
    found = [key for key in state_dict if mark in key or key in expected]  # unknown ones have no adapter's name
    if found:
        check_weights(found, expected)


class TaskModel(AdapterModel):
    """Methods whose forward or auxiliary loss depends on the task."""

    def set_task(self, task: str | int | Tensor) -> None:
        """Choose the task of every forward (and its recomputation in backward) until it is set again.

        The choice holds for every adapter that has the task; each active adapter must have it.

        Args:
            task: name or index of one task for the batch, without device synchronization; or a 1-D integer tensor with
                an index per row. A batch may hold a multiple of these rows, each repeated in place (beam search).

        Raises:
            ValueError: unknown name, index out of range, a tensor that is not 1-D and integer, or any other value.
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
        """Restore the current task at the end, whatever is set inside."""
        before = self._context.tasks
        try:
            yield
        finally:
            self._context.tasks = before

    def _task_index(self, task: str | int | Tensor, tasks: list[str]) -> int | Tensor:
        if isinstance(task, Tensor):
            integer = not (task.is_floating_point() or task.is_complex() or task.dtype == torch.bool)
            if task.dim() == 1 and len(task) and integer and 0 <= int(task.min()) <= int(task.max()) < len(tasks):
                return task.to(next(self.model.parameters()).device, torch.long)
        elif isinstance(task, str) and task in tasks:
            return tasks.index(task)
        elif isinstance(task, Integral) and not isinstance(task, bool) and 0 <= int(task) < len(tasks):
            return int(task)
        listed = ", ".join(f"{name} ({index})" for index, name in enumerate(tasks))
        raise ValueError(f"Unknown task {task!r}. Give a name, an index or a 1-D integer tensor. Tasks: {listed}.")


class AuxLossModel(TaskModel):
    """Methods that know tasks and have an auxiliary loss."""

    def aux_loss(self, sum_over_ranks: SumOverRanks | None = None, ranks: int = 1) -> Tensor:
        """Return the auxiliary loss of the last forward over the tokens of all data-parallel ranks, a scalar.

        Its gradient is scaled so that the average over ranks is the gradient of the loss of all tokens together.

        Args:
            sum_over_ranks: sums a tensor over the ranks. Default: this rank's tokens alone.
            ranks: number of ranks.

        The terms are recorded in training mode with gradients enabled. Otherwise, and if the configuration switches
        the loss off, the result is a zero without gradient, so that one training loop serves all ablations.

        Raises:
            RuntimeError: there was no forward, or reentrant activation checkpointing is enabled.
        """
        terms = self._context.aux_terms
        if terms is None:
            raise RuntimeError("The auxiliary loss belongs to a forward: call the model first.")
        if self._context.aux_without_graph:
            raise RuntimeError(
                "Reentrant activation checkpointing runs the layers without gradients, so the loss has no graph. "
                'Use model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )
        if not terms:
            return torch.zeros((), device=next(self.model.parameters()).device)
        return self._reduce_terms(terms, sum_over_ranks or (lambda values: values), ranks)

    def _reduce_terms(self, terms: list[AuxTerm], sum_over_ranks: SumOverRanks, ranks: int) -> Tensor:
        raise NotImplementedError


def expand_task_index(task: Tensor, batch: int, tasks: list[str]) -> Tensor:
    """Return a task index per row of the batch from one per sample: beam search repeats each row in place."""
    beams, rest = divmod(batch, len(task))
    if rest:
        raise ValueError(
            f"set_task was called with {len(task)} rows, and the batch has {batch}: not a multiple. Tasks: {tasks}."
        )
    return task if beams == 1 else task.repeat_interleave(beams)
