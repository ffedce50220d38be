"""Where the gate sends tokens: the share given to the task expert, by dataset, layer and kind of token (Figure 6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import peft
import torch
from torch import Tensor

from lvlm_clorae import CLoRAEConfig, LoRAMoEConfig
from lvlm_clorae.adapters.layer import AdapterLayer
from lvlm_clorae.analysis.evaluate import DEFAULT_BATCH, Samples, check_tasks
from lvlm_clorae.data.batches import Batcher, Instance
from lvlm_clorae.data.instances import places_of
from lvlm_clorae.data.units import Unit
from lvlm_clorae.errors import UserError
from lvlm_clorae.extractor import Extractor
from lvlm_clorae.models.kinds import KINDS, answer_kinds, input_kinds

if TYPE_CHECKING:
    from rich.table import Table

MODEL, ENCODER, DECODER, CROSS = "model", "encoder", "decoder", "cross"
"""The stacks: that of a model which has one, or an encoder, a decoder, and what in the decoder reads the encoder."""


class Tally(NamedTuple):
    """Tokens counted, and how they were routed. Tallies add."""

    tokens: float = 0.0
    given: float = 0.0
    """How many of them the task expert has: its weight is above 1/2. One of exactly 1/2 counts half."""
    weight: float = 0.0
    """The sum of its weights."""

    def __add__(self, other: Any) -> Tally:
        return Tally(*(mine + its for mine, its in zip(self, other, strict=True)))

    @property
    def share(self) -> float | None:
        """Share of the tokens given to the task expert, in 0..1; None where there are none."""
        return self.given / self.tokens if self.tokens else None

    @property
    def mean(self) -> float | None:
        """The task expert's mean weight, in 0..1; None where there are no tokens."""
        return self.weight / self.tokens if self.tokens else None


class Panel(NamedTuple):
    """Tokens of one kind in one stack: what is shown apart."""

    stack: str
    kind: str

    @property
    def title(self) -> str:
        """As people are told it."""
        if self.stack == MODEL:
            return self.kind
        return f"{'decoder reads encoder' if self.stack == CROSS else self.stack}, {self.kind}"


@dataclass(frozen=True)
class Place:
    """Where an adapted layer stands: ``block`` counts from 0 in its stack, ``module`` is its name inside the block."""

    stack: str
    block: int
    module: str


@dataclass(frozen=True)
class Routing:
    """How a split's tokens were routed."""

    split: str
    samples: Mapping[str, int]
    """How many of each unit."""
    layers: Mapping[str, Place]
    """The adapted layers by name, in the model's order."""
    tallies: Mapping[str, Mapping[str, Mapping[str, Tally]]]
    """By unit, layer and kind of token."""

    def panels(self) -> list[Panel]:
        """The panels in which there are tokens."""
        found = (Panel(stack, kind) for stack in (MODEL, ENCODER, DECODER, CROSS) for kind in KINDS)
        return [panel for panel in found if any(self.total(unit, panel).tokens for unit in self.samples)]

    def layers_of(self, panel: Panel) -> dict[str, Place]:
        """The layers that see the panel's tokens, block after block."""
        found = {name: place for name, place in self.layers.items() if place.stack == panel.stack}
        return dict(sorted(found.items(), key=lambda item: item[1].block))

    def bands(self, stack: str) -> dict[str, list[int]]:
        """The numbers of the stack's bottom, middle and top blocks, see :func:`bands`."""
        return bands(sorted({place.block for place in self.layers.values() if place.stack == stack}))

    def total(self, unit: str, panel: Panel, blocks: Sequence[int] | None = None) -> Tally:
        """The unit's tokens of a panel in all layers of these blocks, by default of all."""
        total = Tally()
        for name, place in self.layers.items():
            if place.stack == panel.stack and (blocks is None or place.block in blocks):
                total += self.tallies[unit][name][panel.kind]
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain data: samples a unit, the bands of each stack, and by unit, layer and kind tokens, share and weight."""
        stacks = dict.fromkeys(place.stack for place in self.layers.values())
        units = {
            unit: {
                layer: {
                    kind: {"tokens": int(tally.tokens), "share": tally.share, "weight": tally.mean}
                    for kind, tally in kinds.items()
                    if tally.tokens
                }
                for layer, kinds in layers.items()
            }
            for unit, layers in self.tallies.items()
        }
        return {
            "split": self.split,
            "samples": dict(self.samples),
            "bands": {stack: self.bands(stack) for stack in stacks},
            "layers": {name: vars(place) for name, place in self.layers.items()},
            "units": units,
        }

    def table(self) -> Table:
        """Shares in percent, a row a unit in each panel: of its bottom, middle and top blocks, whose numbers stand
        above, and of all; and the mean weight."""
        from rich.table import Table

        table = Table(
            title=f"{self.split}: tokens given to the task expert, and its mean weight, %", title_justify="left"
        )
        table.add_column("tokens, dataset", no_wrap=True)
        for name in ("bottom", "middle", "top", "all", "weight"):
            table.add_column(name, justify="right")
        for panel in self.panels():
            found = self.bands(panel.stack)
            numbers = (f"({', '.join(map(str, blocks))})" if blocks else "" for blocks in found.values())
            table.add_row(panel.title, *numbers, "", "", style="bold")
            for unit in self.samples:
                shares = [self.total(unit, panel, blocks).share for blocks in found.values()]
                whole = self.total(unit, panel)
                table.add_row(f"  {unit}", *map(_percent, [*shares, whole.share, whole.mean]))
            table.add_section()
        return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def bands(blocks: Sequence[int]) -> dict[str, list[int]]:
    """The bottom, middle and top of a stack's blocks: of 24 the paper's (0, 1), (11, 12), (22, 23).

    Two blocks each; one where there are less than six, and no middle where there are less than three.
    """
    size = max(1, min(2, len(blocks) // 3))
    middle = (len(blocks) - size) // 2
    return {
        "bottom": list(blocks[:size]),
        "middle": list(blocks[middle : middle + size]) if len(blocks) > 2 else [],
        "top": list(blocks[-size:]),
    }


def measure_routing(
    adapter: Path,
    samples: Samples,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    begin: Callable[[str, int], None] = lambda description, samples: None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Routing:
    """Let an adapter directory read samples with their gold answers, and count how its gate routes the tokens.

    Args:
        batch_size: samples read at once; by default the run's for evaluation
        limit: only so many samples a unit, the first ones
        begin, advance: told what comes and how far it is

    Raises:
        UserError: the adapter has no gate; the weights cannot be read, or know a task of the samples not.
    """
    for name, value in (("batch", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: no samples are left. Give 1 or more.")
    check_gate(adapter)
    extractor = Extractor.from_pretrained(adapter)
    check_tasks(extractor, samples.units.values())
    lengths = extractor.schema["max_length"], extractor.schema["max_answer_length"]
    batcher = Batcher(samples.reader, extractor.processor, samples.split, *lengths)
    size = batch_size or (samples.config.eval_batch if samples.config else DEFAULT_BATCH)
    places = {
        unit.name: places_of(samples.reader, unit.dataset, samples.split)[:limit] for unit in samples.units.values()
    }

    def batches(unit: Unit) -> Iterator[dict[str, Tensor]]:
        instances = [Instance(unit, place) for place in places[unit.name]]
        for start in range(0, len(instances), size):
            batch = batcher(instances[start : start + size])
            yield {name: tensor.to(extractor.device) for name, tensor in batch.tensors.items()}
            advance(len(batch.keys))

    begin(samples.split, sum(map(len, places.values())))
    return Routing(
        samples.split,
        {name: len(found) for name, found in places.items()},
        layer_places(extractor.model),
        {unit.name: route(extractor.model, unit.task, batches(unit)) for unit in samples.units.values()},
    )


def check_gate(adapter: Path) -> None:
    """Raises UserError unless the adapter directory's layers have a gate; no weights are read."""
    config = None
    if (adapter / peft.utils.CONFIG_NAME).is_file():
        try:
            config = peft.PeftConfig.from_pretrained(str(adapter))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{adapter / peft.utils.CONFIG_NAME}: cannot be read ({error}).") from None
    if isinstance(config, LoRAMoEConfig) or (isinstance(config, CLoRAEConfig) and config.use_gate):
        return
    if isinstance(config, CLoRAEConfig):
        what = "its C-LoRAE has no gate (use_gate, use_universal or use_experts was off)"
    elif config is None:
        what = "all weights were trained, without adapter and gate"
    else:
        what = f"{str(config.peft_type).rpartition('.')[2].lower()} has no gate"
    raise UserError(f"{adapter}: {what}, so no token is routed. Give a run of --adapter clorae or loramoe.")


def layer_places(model: Any) -> dict[str, Place]:
    """Where the adapted layers of a PEFT model stand, by name."""
    return {name: _place(name, layer, model.config) for name, layer in model.adapted_layers().items()}


def _place(name: str, layer: AdapterLayer, config: Any) -> Place:
    if not getattr(config, "is_encoder_decoder", False):
        stack = MODEL
    elif layer.reads_encoder:
        stack = CROSS
    else:
        stack = DECODER if layer.masks.is_decoder else ENCODER
    numbered = re.search(r"\.(\d+)\.(.+)", name)  # the first number is the block's: encoder.block.3.layer.0.SelfAtt...
    return Place(stack, int(numbered[1]), numbered[2]) if numbered else Place(stack, 0, name)


@torch.no_grad()
def route(model: Any, task: str, batches: Iterator[dict[str, Tensor]]) -> dict[str, dict[str, Tally]]:
    """Count by layer and kind how a PEFT model with a gate routes the tokens of batches of one task.

    Every layer has its own gate, so a token counts in each. Padding counts nowhere.

    Args:
        batches: what the model's processor gave for prompts with answers, on the model's device
    """
    adapter, layers, places = model.peft_config[model.active_adapter], model.adapted_layers(), layer_places(model)
    model.eval()
    model.set_task(task)
    sums = {name: torch.zeros(len(KINDS), len(Tally()), dtype=torch.float64) for name in layers}
    for batch in batches:
        model(**batch)
        for name, layer in layers.items():
            assert layer.gate_weights is not None
            weights = task_weights(layer.gate_weights[0], adapter, task)
            decoder = places[name].stack == DECODER
            kinds = answer_kinds(batch) if decoder else input_kinds(model.config, batch, weights.shape[1])
            sums[name] += count(weights, kinds).cpu()
    return {name: dict(zip(KINDS, (Tally(*row) for row in rows.tolist()), strict=True)) for name, rows in sums.items()}


def task_weights(weights: Tensor, adapter: CLoRAEConfig | LoRAMoEConfig, task: str) -> Tensor:
    """The weight ``[B, S]`` on what a token's task alone trains, of a layer's gate weights ``[B, S, W]``.

    In C-LoRAE that of the task expert; in LoRAMoE that of all experts of the task's group.
    """
    if isinstance(adapter, CLoRAEConfig):
        return weights.squeeze(-1)
    return weights[..., adapter.tasks.index(task) :: len(adapter.tasks)].sum(-1)


def count(weights: Tensor, kinds: Tensor) -> Tensor:
    """The rows of :class:`Tally` of every kind ``[K, 3]``, of the tokens' weights and kinds ``[B, S]``."""
    weights = weights.double()
    given = (weights > 0.5).double() + 0.5 * (weights == 0.5)
    values = torch.stack([torch.ones_like(weights), given, weights], -1)
    return torch.stack([values[kinds == kind].sum(0) for kind in range(len(KINDS))])
