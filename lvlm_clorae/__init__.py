"""C-LoRAE: collaborative multi-LoRA experts for multimodal information extraction.

Importing this package is cheap: its names are imported on first use. The adapters are registered with PEFT now if PEFT
is imported already, otherwise when it is.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lvlm_clorae.adapters.register import register_when_peft_is_imported
from lvlm_clorae.errors import UserError

if TYPE_CHECKING:
    from lvlm_clorae.adapters.methods.clorae import CLoRAEConfig, CLoRAEModel
    from lvlm_clorae.adapters.methods.hydralora import HydraLoRAConfig
    from lvlm_clorae.adapters.methods.loramoe import LoRAMoEConfig
    from lvlm_clorae.adapters.methods.moslora import MoSLoRAConfig
    from lvlm_clorae.adapters.methods.mtllora import MTLLoRAConfig
    from lvlm_clorae.inference.extractor import Extractor
    from lvlm_clorae.inference.records import Argument, Entity, Event, Record, Records, Relation, Request
    from lvlm_clorae.models import load_model
    from lvlm_clorae.training.config import TrainConfig

__version__ = "0.1.0"
__all__ = [
    "Argument",
    "CLoRAEConfig",
    "CLoRAEModel",
    "Entity",
    "Event",
    "Extractor",
    "HydraLoRAConfig",
    "LoRAMoEConfig",
    "MTLLoRAConfig",
    "MoSLoRAConfig",
    "Record",
    "Records",
    "Relation",
    "Request",
    "TrainConfig",
    "UserError",
    "load_model",
]

_MODULES = {
    "lvlm_clorae.adapters.methods.clorae": ("CLoRAEConfig", "CLoRAEModel"),
    "lvlm_clorae.adapters.methods.hydralora": ("HydraLoRAConfig",),
    "lvlm_clorae.adapters.methods.loramoe": ("LoRAMoEConfig",),
    "lvlm_clorae.adapters.methods.moslora": ("MoSLoRAConfig",),
    "lvlm_clorae.adapters.methods.mtllora": ("MTLLoRAConfig",),
    "lvlm_clorae.inference.extractor": ("Extractor",),
    "lvlm_clorae.models": ("load_model",),
    "lvlm_clorae.inference.records": ("Argument", "Entity", "Event", "Record", "Records", "Relation", "Request"),
    "lvlm_clorae.training.config": ("TrainConfig",),
}

register_when_peft_is_imported()


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            from lvlm_clorae.quiet import quiet_libraries

            with quiet_libraries():  # imports warn too
                return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
