"""Parts of a base by module name, and their sizes: language model, vision tower, projector, fusion, adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from ..errors import UserError

TOWERS = r"(?:.*\.)?(?:vision_tower|vision_model|visual|vision_encoder)(?:\..*)?"
"""Names inside a vision tower, in our models and in transformers'."""

# Names of the query and value projections of attention, in the order in which they are tried.
_QUERY_VALUE = ("q_proj v_proj", "q v", "query value", "qkv_proj", "query_key_value", "c_attn", "Wqkv")


def language_names(model: Any) -> list[str]:
    """Return the dotted names of the modules of the language model: one, or an encoder and a decoder."""
    wanted = [model.get_decoder()]
    if getattr(model.config, "is_encoder_decoder", False):
        wanted.append(model.get_encoder())
    names = [name for name, module in model.named_modules() if any(module is one for one in wanted)]
    if not names or "" in names:
        raise UserError(
            f"{type(model).__name__}: the language model is not a submodule, so it cannot be adapted. Use another base."
        )
    return names


def outside_language(model: Any) -> str:
    """Return a regular expression of all modules outside the language model, for PEFT's ``exclude_modules``."""
    return rf"(?!(?:{'|'.join(map(re.escape, language_names(model)))})\.).*"


def query_and_value(model: Any) -> list[str]:
    """Return the names of attention's query and value projections in the language model, the default targets.

    They reproduce the trainable parameters of the paper's Table 5 to within 1.4 M.
    """
    inside = tuple(f"{name}." for name in language_names(model))
    found = {name.rpartition(".")[2] for name, _ in model.named_modules() if name.startswith(inside)}
    for names in map(str.split, _QUERY_VALUE):
        if found.issuperset(names):
            return names
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    raise UserError(
        f"{type(model).__name__}: no known names of query and value projections. Set target_modules to some of "
        f"{', '.join(linear)}."
    )


@dataclass(frozen=True)
class PartSize:
    """Numbers of parameters and of trained ones, independent of their storage, and the bytes they are stored in."""

    parameters: int = 0
    trained: int = 0
    bytes: int = 0

    def __add__(self, other: PartSize) -> PartSize:
        return PartSize(self.parameters + other.parameters, self.trained + other.trained, self.bytes + other.bytes)


def part_sizes(model: Any) -> dict[str, PartSize]:
    """Return the sizes of the parts, also on the meta device: the language model first, the adapter last.

    Of a module that PEFT trains as a copy, the original takes memory and does not count as parameters.
    """
    found: dict[str, PartSize] = {}
    for name, parameter in model.named_parameters():
        part, size = part_of(name), _size(parameter)
        found[part] = found.get(part, PartSize()) + (PartSize(bytes=size.bytes) if is_original(name) else size)
    order = sorted(found, key=lambda part: (part == "adapter", part != "language model", part))
    return {part: found[part] for part in order}


def is_original(name: str) -> bool:
    """Return whether the parameter is the original of one that PEFT trains as a copy (``modules_to_save``)."""
    return ".original_module." in name


def part_of(name: str) -> str:
    """Return the part of the model, as in :func:`part_sizes`, that contains the parameter."""
    if re.search(rf"\.({'|'.join(map(re.escape, PEFT_TYPE_TO_PREFIX_MAPPING.values()))})", name):
        return "adapter"
    if re.fullmatch(TOWERS, name.removeprefix("base_model.model.")):
        return "vision tower"
    if "fusion." in name:
        return "fusion"
    return "projector" if re.search(r"(projector|connector|merger)\.", name) else "language model"


def _size(parameter: nn.Parameter) -> PartSize:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes, four bits
    number = getattr(parameter, "ds_numel", None) or (state.shape.numel() if state is not None else parameter.numel())
    stored = number if state is None else parameter.numel()
    constants = [getattr(parameter, "SCB", None), getattr(state, "absmax", None)]  # eight bits, four bits
    extra = sum(tensor.numel() * tensor.element_size() for tensor in constants if tensor is not None)
    return PartSize(number, number if parameter.requires_grad else 0, stored * parameter.element_size() + extra)
