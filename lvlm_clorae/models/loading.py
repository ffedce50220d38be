"""From a name to a model and its processor."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.build import LOADERS, Options, empty_model
from lvlm_clorae.models.processor import Processor
from lvlm_clorae.models.quantise import quantisation
from lvlm_clorae.models.source import Source, cannot_load, find_source

DEFAULT_VISION = "ViT-L-14-quickgelu:openai"
FUSIONS = ("concat", "gated")


def load_model(
    name_or_path: str,
    *,
    fusion: str = "concat",
    vision: str | None = None,
    dtype: torch.dtype | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
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
        template: conversation of a causal language model, with ``{image}``, ``{prompt}`` and ``{answer}``

    Returns:
        the model, in eval mode, whose ``forward`` takes what the processor gives. Its ``fresh_parts`` name what of it
        is in no checkpoint and has to be trained.

    Raises:
        UserError: no such model, one that writes no text, a file that is missing, or an option that it has not.
    """
    source = find_source(name_or_path)
    options = _options(source, fusion, vision, template)
    dtype = dtype or torch.float32
    options = Options(options.fusion, options.tower, dtype, quantisation(load_in_8bit, load_in_4bit, dtype), template)
    try:
        model, processor = LOADERS[source.family](source, options)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise cannot_load(source.name, source.base, error) from None
    model.eval()
    return model, processor


def describe_model(name_or_path: str, *, fusion: str = "concat", vision: str | None = None) -> Any:
    """The model on the meta device: all of its shapes, none of its weights; arguments as of :func:`load_model`.

    A preset needs no file for it, anything else its ``config.json``.
    """
    source = find_source(name_or_path, described=True)
    return empty_model(source, _options(source, fusion, vision, None))


def check_options(
    name_or_path: str, *, fusion: str = "concat", vision: str | None = None, template: str | None = None
) -> None:
    """Raises UserError as :func:`load_model` does for a base that is not there or an option that it has not."""
    _options(find_source(name_or_path), fusion, vision, template)


def _options(source: Source, fusion: str, vision: str | None, template: str | None) -> Options:
    """The options, none of which the base has no use for. Raises UserError."""
    if fusion not in FUSIONS:
        raise UserError(f'fusion "{fusion}" is not available: choose {" or ".join(FUSIONS)}.')
    family, own = source.family, source.config
    settled = getattr(own, "fusion", "concat") if family == "own" else "concat"
    if family != "t5" and fusion not in ("concat", settled):
        raise UserError(
            f"fusion = {fusion} is for T5; {source.name} "
            + (f"was made with fusion = {settled}." if family == "own" else "takes pictures in its own way.")
            + " Leave fusion out."
        )
    if vision and family not in ("t5", "causal"):
        raise UserError(f"{source.name} has a vision tower of its own: leave vision out.")
    if template and family != "causal" and family != "llava":
        raise UserError(f"{source.name} takes no prompt template: leave it out.")
    tower = vision or (source.preset.vision if source.preset else None) or DEFAULT_VISION
    return Options(fusion, tower, torch.float32, {}, template)


__all__ = ["DEFAULT_VISION", "check_options", "describe_model", "load_model"]
