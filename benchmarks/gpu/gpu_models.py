"""Whole models in bf16: tokens per second and peak memory of training steps, and tokens per second of decoding."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
from gpu_layers import adapted
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration


class Model(NamedTuple):
    """The shape of a model, the rank r of C-LoRAE, and a micro-batch."""

    family: str
    shape: dict[str, int]
    r: int
    rows: int
    text: int
    answer: int = 64


def t5(d_model: int, d_ff: int, layers: int, heads: int) -> dict[str, int]:
    return {"d_model": d_model, "d_kv": 64, "d_ff": d_ff, "num_layers": layers, "num_heads": heads, "vocab_size": 32128}


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
MODELS = {
    "flan-t5-large": Model("t5", t5(1024, 2816, 24, 16), 64, 16, 512),
    "flan-t5-xl": Model("t5", t5(2048, 5120, 24, 32), 64, 16, 512),
    "llava-1.5-7b": Model("llama", {**LLAMA_7B, "vocab_size": 32064}, 64, 8, 640),  # 576 visual and 64 text tokens
}
TINY_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QUICK = {
    "tiny t5": Model("t5", {**t5(32, 48, 2, 2), "vocab_size": 64}, 4, 2, 16, 4),
    "tiny llama": Model("llama", {**TINY_LLAMA, "vocab_size": 64}, 4, 2, 16, 4),
}
VARIANTS = ("eager", "int8", "compiled")


def build(model: Model, method: str, device: torch.device) -> Any:
    """Return a random model with adapters on all linear layers; a frozen one computes the gradient of its input."""
    with torch.device(device):
        if model.family == "t5":
            config: Any = T5Config(**model.shape, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
            base: Any = T5ForConditionalGeneration(config)
        else:
            base = LlamaForCausalLM(LlamaConfig(**model.shape))
    return prepared(base.to(torch.bfloat16), model, method, device)


def prepared(base: Any, model: Model, method: str, device: torch.device) -> Any:
    """Return the base in training mode, with adapters or with a gradient of its input."""
    base.config.use_cache = False
    if method == "frozen":
        base.requires_grad_(False)
        base.get_input_embeddings().requires_grad_(True)
        return base.train()
    found = adapted(base, method, model.r, target_modules="all-linear", lora_dropout=0.0)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device, torch.bfloat16)
    return found.train()


def batch_of(model: Model, device: torch.device) -> dict[str, Tensor]:
    """Return random tokens; a causal row ends with the answer."""
    generator = torch.Generator().manual_seed(0)

    def tokens(number: int) -> Tensor:
        return torch.randint(3, model.shape["vocab_size"], (model.rows, number), generator=generator).to(device)

    labels = tokens(model.answer)
    if model.family == "t5":
        return {"input_ids": tokens(model.text), "labels": labels}
    ids = torch.cat([tokens(model.text), labels], 1)
    return {"input_ids": ids, "labels": ids.clone().index_fill(1, torch.arange(model.text, device=device), -100)}


def measure(model: Model, variant: str, method: str, device: torch.device) -> dict[str, Any]:
    """Return the figures of a method in a variant."""
    if variant == "int8":
        module = prepared(quantized(model, device), model, method, device)
    else:
        module = build(model, method, device)
    found = train(module, model, variant, device)
    if variant == "eager":
        found["decoded_per_second"] = decode(module, model, device)
    del module
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def quantized(model: Model, device: torch.device) -> Any:
    """Return the random base in 8 bits. Raises ImportError without bitsandbytes."""
    import tempfile

    import bitsandbytes  # noqa: F401 - else an error of transformers

    with tempfile.TemporaryDirectory() as folder:
        plain = build(model, "frozen", torch.device("cpu") if device.type == "cpu" else device)
        plain.save_pretrained(folder)
        kind = type(plain)
        del plain
        settings = BitsAndBytesConfig(load_in_8bit=True)
        return kind.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16, device_map={"": device})


def train(module: Any, model: Model, variant: str, device: torch.device) -> dict[str, float]:
    """Return tokens per second, TFLOP/s of the base's products, and the peak memory of forward and backward."""
    batch = batch_of(model, device)
    step: Any = module
    if variant == "compiled":
        # On a CPU code generation takes minutes and shows nothing about a GPU
        step = torch.compile(module, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(3 + (7 if device.type == "cuda" else 1)):
        began = time.perf_counter()
        loss = step(**batch).loss
        if aux := getattr(getattr(module, "base_model", None), "aux_loss", None):
            loss = loss + 0.01 * aux()
        loss.backward()
        module.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - began)
    tokens, median = model.rows * (model.text + model.answer), statistics.median(seconds)
    found = {"tokens_per_second": tokens / median, "tflop_per_second": flop(module, model) / median / 1e12}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def flop(module: Any, model: Model) -> float:
    """Return 4 operations per token and weight of the base's linear layers, as for a frozen weight; of T5 per stack."""

    def weights(part: Any) -> int:
        return sum(one.in_features * one.out_features for one in part.modules() if hasattr(one, "in_features"))

    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    if model.family == "t5":
        found = model.text * weights(base.encoder) + model.answer * (weights(base.decoder) + weights(base.lm_head))
        return 4.0 * model.rows * found
    return 4.0 * model.rows * (model.text + model.answer) * weights(base)


@torch.no_grad()
def decode(module: Any, model: Model, device: torch.device) -> float:
    """Return new tokens per second with the KV cache."""
    module.eval()
    ids = batch_of(model, device)["input_ids"]
    length = {"min_new_tokens": model.answer, "max_new_tokens": model.answer, "do_sample": False, "use_cache": True}
    for _ in range(2):
        began = time.perf_counter()
        module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **length)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return model.rows * model.answer / (time.perf_counter() - began)


def table(results: dict[str, Any]) -> str:
    """Format the sections of models as Markdown."""
    formats = {"tokens_per_second": ".0f", "tflop_per_second": ".1f", "peak_gib": ".1f", "decoded_per_second": ".0f"}
    lines = ["| model | variant | method | tokens/s | TFLOP/s | peak [GiB] | decoding [tokens/s] |"]
    lines.append("|---|---|---|---:|---:|---:|---:|")
    for name, row in results.items():
        if name.startswith("models/"):
            cells = [format(row[key], shape) if key in row else "" for key, shape in formats.items()]
            lines.append(f"| {' | '.join([*name.split('/')[1:], *cells])} |")
    return "\n".join(lines)
