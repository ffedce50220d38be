"""Base models: loading, vision tower, projector, families and their processors. Heavy imports happen on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvlm_clorae.models.families import Family, register_family
    from lvlm_clorae.models.loading import load_model
    from lvlm_clorae.models.processor import Processor

__all__ = ["Family", "Processor", "load_model", "register_family"]

_MODULES = {"Family": "families", "Processor": "processor", "load_model": "loading", "register_family": "families"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
