"""Model families: how a base is recognized, loaded and described, and its processor.

A family is a subclass of :class:`Family`. A built-in one is a module of this package that ends with ``FAMILY = ...``
and is named in ``BUILT_IN``; any other is added by :func:`register_family`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
from transformers import GenerationConfig

from ...errors import UserError
from ..gguf import FLAGS
from ..presets import Preset
from ..processor import Processor, read_tokenizer
from ..vision import REPOSITORIES, VisionTower, split_tower, tower_config

BUILT_IN = ("t5", "llava", "image_text", "causal")
"""Modules of the built-in families. The first family that matches loads a base, so specific ones come first."""

_registered: list[Family] = []


@dataclass(frozen=True)
class Source:
    """A base by the user's name: the directory or hub id of its files, its configuration and its preset, if any.

    ``gguf`` is the file in the directory ``base``, if it is a GGUF file.
    """

    name: str
    base: str
    config: Any
    preset: Preset | None
    gguf: Path | None = None

    def load_tokenizer(self) -> Any:
        """Load the tokenizer of the base."""
        file = {"gguf_file": self.gguf.name} if self.gguf else {}
        return read_tokenizer(self.base, **file)


@dataclass(frozen=True)
class LoadOptions:
    """Options of :func:`lvlm_clorae.models.load_model` with their defaults resolved."""

    fusion: str
    vision: str | None
    """None: text only."""
    vision_layer: int
    projector: str
    template: str | None
    dtype: torch.dtype = torch.float32
    quantization: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``from_pretrained`` that quantize, or read a GGUF file."""

    @property
    def from_pretrained(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for the language model."""
        return {"dtype": self.dtype, **self.quantization}

    def load_tower(self) -> VisionTower | None:
        """Build the vision tower with its weights; None for a text-only base."""
        if self.vision is None:
            return None
        self.check_tower()
        name, tag = split_tower(self.vision)
        return VisionTower(name, pretrained=tag, layer=self.vision_layer).to(self.dtype)

    def check_tower(self) -> None:
        """Raise UserError for an unknown tower, or one without weights: an adapter does not store a random one."""
        if self.vision is None:
            return
        self.tower_settings()
        name, tag = split_tower(self.vision)
        if not (tag or name.startswith(REPOSITORIES) or Path(name).is_dir()):
            known = open_clip.list_pretrained_tags_by_model(name)
            example = f"{name}:{known[0] if known else '/path/to/weights.safetensors'}"
            raise UserError(f"vision = {self.vision} has no weights. Give a tag of open_clip or a file: {example}.")

    def tower_settings(self) -> dict[str, Any] | None:
        """Return arguments of ``VisionTower`` that rebuild the tower without its weights and without the hub."""
        if self.vision is None:
            return None
        name, _ = split_tower(self.vision)
        described = ":" in name or Path(name).is_dir()
        return {"model": tower_config(name) if described else name, "layer": self.vision_layer}


class Family(ABC):
    """One family of base models; stateless."""

    name: ClassVar[str]
    description: ClassVar[str]
    """The supported models in a few words, for error messages."""
    processor_class: ClassVar[type[Processor]]
    options: ClassVar[tuple[str, ...]] = ()
    """Options of ``load_model`` that a published base of this family accepts."""
    saved_class: ClassVar[Any] = None
    """Model class whose ``save_pretrained`` writes whole models of this family; they accept no option."""

    @abstractmethod
    def matches(self, config: Any) -> bool:
        """Return whether this family loads bases with this configuration."""

    @abstractmethod
    def load(self, source: Source, options: LoadOptions) -> tuple[Any, Processor]:
        """Load a published model with its weights, and its processor."""

    @abstractmethod
    def describe(self, source: Source, options: LoadOptions) -> Any:
        """Build a published model without its weights. Called with the meta device as torch's default."""

    def newly_initialized(self, options: LoadOptions) -> tuple[str, ...]:
        """Return the names of the parts that are in no published checkpoint and have to be trained."""
        return ()

    def is_saved(self, config: Any) -> bool:
        """Return whether the configuration is that of a directory written by :attr:`saved_class`."""
        return self.saved_class is not None and isinstance(config, self.saved_class.config_class)


def families() -> list[Family]:
    """Return all families in the order in which they are tried: registered ones, then the built-in ones."""
    return [*_registered, *(importlib.import_module(f"{__name__}.{module}").FAMILY for module in BUILT_IN)]


def register_family(family: Family) -> None:
    """Add a model family, tried before those added earlier and built-in ones. Raises ValueError for a known name."""
    if family.name in {known.name for known in families()}:
        raise ValueError(f'A model family named "{family.name}" exists. Choose another name.')
    _registered.insert(0, family)


def find_family(config: Any, name: str) -> Family:
    """Return the family that loads the base ``name`` with this configuration, else raise UserError."""
    for family in families():
        if family.matches(config):
            return family
    raise UserError(
        f'{name} is a "{config.model_type}" model, which no model family supports. '
        f"Supported: {'; '.join(family.description for family in families())}."
    )


def complete_model(model: Any, loaded: Any, dtype: torch.dtype, parts: tuple[str, ...]) -> None:
    """Give initial weights to the parts of ``model`` that are on the meta device, and set its quantization flags.

    The weights depend on torch's seed alone, since loading under ZeRO-3 consumes a different amount of random numbers.
    The flags are those of the ``loaded`` model inside it: PEFT looks for them on the outermost.
    """
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed())
        for part in parts:
            modules = list(getattr(model, part).to_empty(device="cpu").modules())
            for module in modules:
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            for module in modules:  # afterwards, since T5's own rule resets a layer with all of its linear parts
                model._init_weights(module)
            getattr(model, part).to(dtype)
    for name in FLAGS:
        if hasattr(loaded, name):
            setattr(model, name, getattr(loaded, name))


def greedy_generation(model: Any, processor: Processor) -> GenerationConfig:
    """Return the settings for greedy decoding, up to an end token of the model or that of the tokenizer."""
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), processor.eos_token_id]
    return GenerationConfig(
        eos_token_id=list(dict.fromkeys(end for end in ends if end is not None)),
        pad_token_id=processor.pad_token_id,
        do_sample=False,
    )
