"""Vision tower, projector, language models, their processor and loading. Heavy parts are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvlm_clorae.models.loading import load_model
    from lvlm_clorae.models.processor import Processor

__all__ = ["Processor", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from lvlm_clorae.models.loading import load_model

        return load_model
    if name == "Processor":
        from lvlm_clorae.models.processor import Processor

        return Processor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
