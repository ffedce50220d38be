"""Quantization of frozen weights to eight bits (LLM.int8) or four (nf4) by bitsandbytes."""

import logging
from typing import Any

import torch

from ..errors import UserError

_PARTS = "vision_tower|vision_model|visual|vision_encoder|projector|multi_modal_projector|connector|fusion|lm_head"
NOT_QUANTIZED = rf"(?:.*\.)?(?:{_PARTS})(?:\..*)?$"
"""Names of the output head and of the modules outside the language model, in our models and in transformers'."""


def quantization_arguments(load_in_8bit: bool, load_in_4bit: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` that quantize the linear layers of the language model, if any.

    Norms, embeddings, output head and vision parts stay in ``dtype``. So does T5's ``wo``, by transformers' own rule:
    its inputs may exceed the range of fp16, in which LLM.int8 multiplies.
    """
    if not (load_in_8bit or load_in_4bit):
        return {}
    if load_in_8bit and load_in_4bit:
        raise UserError("load_in_8bit and load_in_4bit exclude each other. Choose one.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"Quantized bases need bitsandbytes ({error}). Run: pip install bitsandbytes") from None
    from transformers import BitsAndBytesConfig

    # bitsandbytes warns at every product of every layer that it multiplies in fp16, as intended.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if load_in_4bit:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {
        "quantization_config": BitsAndBytesConfig(**settings, llm_int8_skip_modules=[NOT_QUANTIZED]),
        "device_map": {"": device},
    }


def disable_cpu_repacking(model: Any) -> None:
    """Keep bitsandbytes from repacking four-bit weights of ``model`` when it is evaluated on a CPU.

    With AVX512-BF16 ``Linear4bit`` otherwise repacks in place at its first forward in eval mode, for a product without
    a gradient: training after an evaluation would silently lose the gradient of all layers below (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
