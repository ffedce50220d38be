"""Adapter methods, small models and base layers for the adapter tests."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from lvlm_clorae.adapters.register import adapter_method, method_names

TASKS = ["mner", "mre", "mee"]
METHODS = [name for name in method_names() if name != "lora"]
"""Our methods; plain LoRA is PEFT's own and has PEFT's tests."""
SCALE = {"r": 4, "lora_alpha": 8}
"""A fixed scale: a larger one magnifies the rounding errors of the small models."""


def make_config(method: str, **fields: Any) -> peft.PeftConfig:
    """Return a configuration of the method, with tasks if it knows tasks."""
    described = adapter_method(method)
    tasks = {"tasks": list(TASKS)} if described.knows_tasks else {}
    return described.config_cls(**{**tasks, **SCALE, **fields})


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
    """Return inputs of which the second row is padded; the labels are as long as the inputs, as LLaMA needs them."""
    ids = torch.randint(1, 40, (rows, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def seq2seq_batch(rows: int = 2) -> dict[str, torch.Tensor]:
    """Return inputs of which the second row is padded, and shorter labels of which the first row is padded."""
    labels = torch.randint(1, 40, (rows, 5), generator=torch.Generator().manual_seed(2))
    labels[0, 3:] = -100
    return {**batch(rows), "labels": labels}


def randomise(model: Any, seed: int = 3) -> Any:
    """Move every adapter parameter away from its initial value, so that each affects the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.base_model.prefix in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def adapted(method: str, base: Any, task: str | None = "mner", **fields: Any) -> Any:
    """Return the base with a randomised adapter, and its task set if the method knows tasks."""
    model = randomise(peft.get_peft_model(base, make_config(method, **fields)))
    set_task(model, task)
    return model


def set_task(model: Any, task: Any) -> None:
    if task is not None and hasattr(model.base_model, "set_task"):
        model.base_model.set_task(task)


def aux_loss(model: Any) -> torch.Tensor:
    """Return the method's auxiliary loss of the last forward, zero if it has none."""
    loss = getattr(model.base_model, "aux_loss", None)
    return loss() if loss else torch.zeros(())


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def layers_of(model: Any) -> dict[str, Any]:
    return model.base_model.adapted_layers()


class Net(nn.Module):
    """A model with one layer to adapt, called ``layer``."""

    D_IN, D_OUT = 64, 48

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(self.D_IN, self.D_IN), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.before(x)).tanh()


def linear(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(Net.D_IN, Net.D_OUT, bias=bias)


def conv1d() -> Conv1D:
    torch.manual_seed(0)
    return Conv1D(Net.D_OUT, Net.D_IN)


def quantised(bits: str) -> nn.Module:
    layer = {
        "8bit": lambda: bnb.nn.Linear8bitLt(Net.D_IN, Net.D_OUT, bias=False, has_fp16_weights=False),
        "4bit": lambda: bnb.nn.Linear4bit(
            Net.D_IN, Net.D_OUT, bias=False, quant_type="nf4", compute_dtype=torch.float32
        ),
    }[bits]()
    layer.load_state_dict(linear(bias=False).state_dict())
    return layer.to("cpu")  # quantises


BASE_LAYERS = {
    "linear": lambda: linear(bias=False),
    "linear with bias": lambda: linear(bias=True),
    "conv1d": conv1d,
    "8bit": lambda: quantised("8bit"),
    "4bit": lambda: quantised("4bit"),
}


def net_input() -> torch.Tensor:
    return torch.randn(2, 5, Net.D_IN, generator=torch.Generator().manual_seed(4))
