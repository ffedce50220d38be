"""The methods and the small models that the behaviour tests run over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from lvlm_clorae import CLoRAEConfig, LoRAMoEConfig, MoSLoRAConfig
from tests.adapters.clorae_reference import TASKS

SCALE = {"r": 4, "lora_alpha": 8}
"""Given, for a shaken adapter of more scale blows up what the tests' small models round."""
METHODS: dict[str, Callable[..., peft.PeftConfig]] = {
    "clorae": lambda **fields: CLoRAEConfig(**{"tasks": list(TASKS), **SCALE, **fields}),
    "moslora": lambda **fields: MoSLoRAConfig(**{**SCALE, **fields}),
    "loramoe": lambda **fields: LoRAMoEConfig(**{"tasks": list(TASKS), **SCALE, **fields}),
}


def t5(dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=dropout,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (rows, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def shake(model: Any, seed: int = 3) -> Any:
    """Move every adapter parameter away from its start, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.base_model.prefix in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def adapted(method: str, base: Any, task: str | None = "mner", **fields: Any) -> Any:
    """The base with a shaken adapter, and its task set where the method knows tasks."""
    model = shake(peft.get_peft_model(base, METHODS[method](**fields)))
    choose(model, task)
    return model


def choose(model: Any, task: Any) -> None:
    if task is not None and hasattr(model.base_model, "set_task"):
        model.base_model.set_task(task)


def side_loss(model: Any) -> torch.Tensor:
    """The method's own loss of the last forward, zero where it has none."""
    tuner = model.base_model
    loss = getattr(tuner, "mutual_information_loss", None) or getattr(tuner, "balance_loss", None)
    return loss() if loss else torch.zeros(())


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def layers_of(model: Any) -> dict[str, Any]:
    return model.base_model.adapted_layers()
