"""The weights of a described model one by one, in the order in which a step uses them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lvlm_clorae.models.parts import TOWERS
from lvlm_clorae.models.quantise import STAY

BLOCK = re.compile(r".*?\.(?:block|layers|h)\.\d+(?=\.)")
"""A block of a language model, which checkpointing computes anew as a whole."""


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Args:
        name: as the model has it
        numel: elements
        bytes: as it is stored, quantisation constants included
        trained: whether it has a gradient
        stack: ``tower``, ``projector``, ``embedding``, ``encoder``, ``decoder`` (also a causal model's), or ``unused``
        matrix: whether it multiplies tokens, so that a token costs two FLOPs an element
    """

    name: str
    numel: int
    bytes: int
    trained: bool
    stack: str
    matrix: bool = False

    @property
    def module(self) -> str:
        """The module that ZeRO-3 gathers it for; a tower's weights all come together."""
        return self.stack if self.stack == "tower" else self.name.rpartition(".")[0]

    @property
    def block(self) -> str:
        """The block it lies in; empty outside of one."""
        found = BLOCK.match(self.name) if self.stack in ("encoder", "decoder") else None
        return found[0] if found else ""


def list_weights(model: Any, itemsize: int, bits: int = 16) -> list[Weight]:
    """The weights, adapted, in the order of registration.

    Args:
        model: adapted, may be on the meta device
        itemsize: bytes of an element of what is not quantised
        bits: 8 or 4 where the linear layers of the frozen language model are quantised (docs/models.md)
    """
    embedding = model.get_input_embeddings().weight
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    found = []
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.")
        stack = _stack(plain, parameter is embedding)
        quantised = bits < 16 and id(parameter) in linear and not parameter.requires_grad
        quantised = quantised and not re.match(STAY, plain) and ".wo." not in plain and stack in ("encoder", "decoder")
        stored = _quantised_bytes(parameter, bits) if quantised else itemsize * parameter.numel()
        found.append(Weight(name, parameter.numel(), stored, parameter.requires_grad, stack, parameter.dim() >= 2))
    return found


def _stack(name: str, is_embedding: bool) -> str:
    if "original_module." in name:
        return "unused"  # PEFT keeps what modules_to_save has a trained copy of
    if re.fullmatch(TOWERS, name):
        return "tower"
    if re.search(r"(projector|connector|merger|fusion)\.", name):
        return "projector"
    if is_embedding:
        return "embedding"
    return "encoder" if re.match(r"(?:.*\.)?encoder\.", name) else "decoder"


def _quantised_bytes(parameter: nn.Parameter, bits: int) -> int:
    """LLM.int8 has a scale a row, nf4 one for 64 elements, both fp32."""
    scales = parameter.shape[0] if bits == 8 else -(-parameter.numel() // 64)
    return parameter.numel() * bits // 8 + 4 * scales


@dataclass(frozen=True)
class Use:
    """One time that a step needs a weight whole.

    Args:
        weight: its place in the list of weights
        turn: the place in the list of uses at which the way back through this part of the model begins
    """

    weight: int
    turn: int


def order_of_uses(weights: Sequence[Weight], checkpointing: bool) -> list[Use]:
    """The uses of a micro-step in order: forward, then backward of all that a gradient passes through.

    With checkpointing each block is computed forward again before its backward.
    """
    forward = _forward(weights)
    uses = [Use(weight, len(forward)) for weight, _ in forward]
    back = [weight for weight, has_gradient in reversed(forward) if has_gradient]
    if not checkpointing:
        return uses + [Use(weight, len(forward)) for weight in back]
    for block in _runs(back, weights):
        if weights[block[0]].block:
            turn = len(uses) + len(block)
            uses += [Use(weight, turn) for weight in reversed(block)]
        uses += [Use(weight, len(uses)) for weight in block]
    return uses


def _forward(weights: Sequence[Weight]) -> list[tuple[int, bool]]:
    """(weight, whether a gradient passes through its module) in the order of a forward."""
    places: dict[str, list[int]] = {}
    for place, weight in enumerate(weights):
        places.setdefault("head" if "lm_head." in weight.name else weight.stack, []).append(place)
    embedding = places.get("embedding", [])
    order = [*embedding, *places.get("tower", []), *places.get("projector", []), *places.get("encoder", [])]
    if "encoder" in places:
        order += embedding  # the decoder's own
    order += places.get("decoder", [])
    order += places.get("head", embedding)
    head = len(order) - len(places.get("head", embedding))
    found, trained = [], False
    for number, place in enumerate(order):
        weight = weights[place]
        trained = trained or weight.trained
        looked_up = weight.stack == "embedding" and number < head  # ids have no gradient
        found.append((place, weight.trained or (trained and not looked_up)))
    return found


def _runs(places: list[int], weights: Sequence[Weight]) -> list[list[int]]:
    """The places in runs of one block each."""
    runs: list[list[int]] = []
    for place in places:
        if not runs or weights[runs[-1][-1]].block != weights[place].block:
            runs.append([])
        runs[-1].append(place)
    return runs
