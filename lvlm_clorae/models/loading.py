"""From a name to a model and its processor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.build import LOADERS, Options, empty_model, vision_of
from lvlm_clorae.models.processor import Processor
from lvlm_clorae.models.quantise import keep_layout, quantisation
from lvlm_clorae.models.settings import FUSIONS, PROJECTORS
from lvlm_clorae.models.source import Source, cannot_load, find_source

DEFAULT_VISION = "ViT-L-14-quickgelu:openai"

# An option -> the families of bases that it is for, and what another base says to it.
_MEANT_FOR = {
    "fusion": (("t5",), "is for T5; {name} takes pictures in its own way"),
    "vision": (("t5", "causal"), "is for a base without a vision tower; {name} has one of its own"),
    "vision_layer": (("t5", "causal"), "is for a base without a vision tower; {name} has one of its own"),
    "projector": (("t5", "causal"), "is for a base without a projector; {name} has one of its own"),
    "template": (("causal", "llava"), "is for causal language models; {name} takes no prompt template"),
}


def load_model(
    name_or_path: str,
    *,
    fusion: str = "concat",
    vision: str | None = None,
    dtype: torch.dtype | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    vision_layer: int | None = None,
    projector: str | None = None,
    template: str | None = None,
) -> tuple[Any, Processor]:
    """A model and its processor.

    Args:
        name_or_path: a preset, a local directory or a hub id: of our own (``save_pretrained``), T5, a causal language
            model, LLaVA-1.5 in the layout of llava-hf, or any other image-text-to-text model of transformers
        fusion: how pictures reach T5: ``concat`` (visual tokens before the text) or ``gated`` (UMIE's)
        vision: ``model:tag`` of open_clip for a base without a tower; the tag may be a local weight file or empty for
            random weights; ``hf-hub:OWNER/NAME`` and ``local-dir:PATH`` too
        dtype: of all weights that are not quantised; default float32
        load_in_8bit, load_in_4bit: the linear layers of the language model in LLM.int8 or nf4
        vision_layer: block of the tower whose patch tokens are taken; default -2, LLaVA's choice
        projector: ``mlp2x_gelu`` (default) or ``linear``, for a base without one
        template: conversation of a causal language model, with ``{image}``, ``{prompt}`` and ``{answer}``

    Returns:
        the model, in eval mode, whose ``forward`` takes what the processor gives. Its ``fresh_parts`` name what of it
        is in no checkpoint and has to be trained.

    Raises:
        UserError: no such model, one that writes no text, a file that is missing, or an option that it has not.
    """
    source = find_source(name_or_path)
    dtype = dtype or torch.float32
    chosen: dict[str, Any] = {"vision": vision, "vision_layer": vision_layer, "projector": projector}
    options = replace(
        _options(source, fusion=fusion, template=template, **chosen),
        dtype=dtype,
        quantised=quantisation(load_in_8bit, load_in_4bit, dtype),
    )
    try:
        model, processor = LOADERS[source.family](source, options)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise cannot_load(source.name, source.base, error) from None
    keep_layout(model)
    model.eval()
    return model, processor


def describe_model(name_or_path: str, **options: Any) -> Any:
    """The model on the meta device: all of its shapes, none of its weights.

    A preset needs no file for it, anything else its ``config.json``.

    Args:
        options: fusion, vision, vision_layer and projector of :func:`load_model`
    """
    source = find_source(name_or_path, described=True)
    return empty_model(source, _options(source, **options))


def check_options(name_or_path: str, **options: Any) -> None:
    """Raises UserError as :func:`load_model` does for a base that is not there or an option that it has no use for."""
    source = find_source(name_or_path)
    found = _options(source, **options)
    if source.family in _MEANT_FOR["vision"][0]:
        vision_of(found)


def _options(
    source: Source,
    *,
    fusion: str = "concat",
    vision: str | None = None,
    vision_layer: int | None = None,
    projector: str | None = None,
    template: str | None = None,
) -> Options:
    """The options, none of which the base has no use for. Raises UserError."""
    for option, value, choices in (("fusion", fusion, FUSIONS), ("projector", projector, PROJECTORS)):
        if value is not None and value not in choices:
            raise UserError(f'{option} "{value}" is not available: choose {" or ".join(choices)}.')
    given: dict[str, Any] = {
        "vision": vision,
        "vision_layer": vision_layer,
        "projector": projector,
        "template": template,
    }
    given["fusion"] = None if fusion in ("concat", getattr(source.config, "fusion", None)) else fusion
    for option, value in given.items():
        families, why = _MEANT_FOR[option]
        if value is not None and source.family not in families:
            raise UserError(f"{option} = {value} {why.format(name=source.name)}. Leave {option} out.")
    return Options(
        fusion=fusion,
        tower=vision or (source.preset.vision if source.preset else None) or DEFAULT_VISION,
        layer=-2 if vision_layer is None else vision_layer,
        projector=projector or "mlp2x_gelu",
        template=template,
    )


__all__ = ["DEFAULT_VISION", "check_options", "describe_model", "load_model"]
