"""Frozen weights in eight bits (LLM.int8) or four (nf4) through bitsandbytes."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..errors import UserError

# The parts of any of transformers' models that are not its language model, and the output head: a regular expression.
_PARTS = "vision_tower|vision_model|visual|vision_encoder|projector|multi_modal_projector|connector|fusion|lm_head"
STAY = rf"(?:.*\.)?(?:{_PARTS})(?:\..*)?$"


def quantisation(load_in_8bit: bool, load_in_4bit: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise the linear layers of the language model; none where neither.

    Norms, embeddings, output head and vision parts stay in ``dtype``, and T5's ``wo`` does (transformers sees to it):
    its inputs may lie outside fp16, in which LLM.int8 multiplies.

    Raises:
        UserError: both are asked for, or bitsandbytes is not installed.
    """
    if not (load_in_8bit or load_in_4bit):
        return {}
    if load_in_8bit and load_in_4bit:
        raise UserError("load_in_8bit and load_in_4bit exclude each other: choose one.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"Quantised bases need bitsandbytes ({error}): pip install bitsandbytes") from None
    from transformers import BitsAndBytesConfig

    # It says at every product of every layer that it multiplies in fp16, which is what was asked for.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if load_in_8bit:
        settings: dict[str, Any] = {"load_in_8bit": True}
    else:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {
        "quantization_config": BitsAndBytesConfig(**settings, llm_int8_skip_modules=[STAY]),
        "device_map": {"": device},
    }


def keep_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking four-bit weights of ``model`` when it is evaluated on a CPU.

    With AVX512-BF16 ``Linear4bit`` otherwise repacks in place at its first forward in eval mode, for a product through
    which no gradient goes: training after an evaluation would silently lose that of all layers below. It also fails
    where a row is no multiple of its blocks of 64 (bitsandbytes 0.50, ``functional._convert_weight_packed_for_cpu``).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
