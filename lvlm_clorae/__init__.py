"""C-LoRAE: collaborative multi-LoRA experts for multimodal information extraction.

Importing this package costs nothing heavy: the names below are loaded when first used, and the adapters register
themselves with PEFT now if PEFT is imported already, else the moment it is.
"""

from __future__ import annotations

import importlib
from typing import Any

from lvlm_clorae.adapters.registration import register_when_peft_is_imported

_LAZY = {
    "CLoRAEConfig": "lvlm_clorae.adapters.clorae",
    "CLoRAEModel": "lvlm_clorae.adapters.clorae",
    "LoRAMoEConfig": "lvlm_clorae.adapters.loramoe",
    "MoSLoRAConfig": "lvlm_clorae.adapters.moslora",
    "Extractor": "lvlm_clorae.extractor",
    "load_model": "lvlm_clorae.models",
}

register_when_peft_is_imported()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
