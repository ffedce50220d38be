"""Gate routing: the share of tokens given to the task expert, by dataset task, layer and token type (Figure 6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor

from lvlm_clorae import CLoRAEConfig, LoRAMoEConfig
from lvlm_clorae.analysis.evaluate import DEFAULT_BATCH, Samples, check_tasks
from lvlm_clorae.analysis.tables import Sheet
from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.index import DatasetTask
from lvlm_clorae.errors import UserError
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.models.processor import TOKEN_TYPES, answer_token_types, input_token_types

MODEL, ENCODER, DECODER, CROSS = "model", "encoder", "decoder", "cross"
"""Stacks of layers; the last are the decoder's layers that read the encoder."""


class Tally(NamedTuple):
    """Counts of routed tokens, which add up."""

    tokens: float = 0.0
    given: float = 0.0  # tokens whose task expert weighs more than 1/2; exactly 1/2 counts half
    weight: float = 0.0  # sum of the task expert's weights

    def __add__(self, other: Any) -> Tally:
        return Tally(*(mine + its for mine, its in zip(self, other, strict=True)))

    @property
    def share(self) -> float | None:
        """Share of the tokens given to the task expert, in 0..1; None without tokens."""
        return self.given / self.tokens if self.tokens else None

    @property
    def mean(self) -> float | None:
        """Mean weight of the task expert, in 0..1; None without tokens."""
        return self.weight / self.tokens if self.tokens else None


class Panel(NamedTuple):
    """Tokens of one type in one stack, which tables and plots show together."""

    stack: str
    token_type: str

    @property
    def title(self) -> str:
        """Name in tables and plots."""
        if self.stack == MODEL:
            return self.token_type
        return f"{'decoder reads encoder' if self.stack == CROSS else self.stack}, {self.token_type}"


@dataclass(frozen=True)
class LayerLocation:
    """Position of an adapted layer: its stack, its block there from 0, and its name inside the block."""

    stack: str
    block: int
    module: str


@dataclass(frozen=True)
class Routing:
    """Routing of a split's tokens."""

    split: str
    samples: Mapping[str, int]  # number by dataset task
    layers: Mapping[str, LayerLocation]  # by name, in the model's order
    tallies: Mapping[str, Mapping[str, Mapping[str, Tally]]]  # by dataset task, layer and token type

    def panels(self) -> list[Panel]:
        """The panels that have tokens."""
        found = [Panel(stack, name) for stack in (MODEL, ENCODER, DECODER, CROSS) for name in TOKEN_TYPES]
        return [panel for panel in found if any(self.total(name, panel).tokens for name in self.samples)]

    def layers_of(self, panel: Panel) -> dict[str, LayerLocation]:
        """The layers that see the panel's tokens, ordered by block."""
        found = {name: layer for name, layer in self.layers.items() if layer.stack == panel.stack}
        return dict(sorted(found.items(), key=lambda item: item[1].block))

    def bands(self, stack: str) -> dict[str, list[int]]:
        """Block numbers of the stack's :func:`bands`."""
        return bands(sorted({layer.block for layer in self.layers.values() if layer.stack == stack}))

    def total(self, dataset_task: str, panel: Panel, blocks: Sequence[int] | None = None) -> Tally:
        """Sum the counts of a panel over the layers of these blocks, by default of all."""
        total = Tally()
        for name, layer in self.layers.items():
            if layer.stack == panel.stack and (blocks is None or layer.block in blocks):
                total += self.tallies[dataset_task][name][panel.token_type]
        return total

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: samples, bands, layers, and counts by dataset task, layer and token type."""
        dataset_tasks = {
            dataset_task: {
                layer: {
                    name: {"tokens": int(tally.tokens), "share": tally.share, "weight": tally.mean}
                    for name, tally in tallies.items()
                    if tally.tokens
                }
                for layer, tallies in layers.items()
            }
            for dataset_task, layers in self.tallies.items()
        }
        return {
            "split": self.split,
            "samples": dict(self.samples),
            "bands": {stack: self.bands(stack) for stack in dict.fromkeys(at.stack for at in self.layers.values())},
            "layers": {name: vars(layer) for name, layer in self.layers.items()},
            "dataset_tasks": dataset_tasks,
        }

    def table(self) -> Sheet:
        """Shares of the bottom, middle, top and all blocks, and the mean weight, in percent."""
        sheet = Sheet(
            f"{self.split}: tokens given to the task expert, and its mean weight, %",
            ["tokens, dataset", "bottom", "middle", "top", "all", "weight"],
        )
        for panel in self.panels():
            found = self.bands(panel.stack)
            numbers = [f"({', '.join(map(str, blocks))})" if blocks else "" for blocks in found.values()]
            sheet.best |= {(len(sheet.rows), column) for column in range(4)}
            sheet.rows.append([panel.title, *numbers, "", ""])
            for dataset_task in self.samples:
                shares = [self.total(dataset_task, panel, blocks).share for blocks in found.values()]
                whole = self.total(dataset_task, panel)
                sheet.rows.append([f"  {dataset_task}", *map(_percent, [*shares, whole.share, whole.mean])])
        return sheet


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def bands(blocks: Sequence[int]) -> dict[str, list[int]]:
    """The bottom, middle and top blocks of a stack: of 24 the paper's (0, 1), (11, 12), (22, 23).

    Each band has two blocks, or one if there are fewer than six; there is no middle if there are fewer than three.
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
    begin: Callable[[str, int], None] = lambda description, samples: None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Routing:
    """Count how the gate of an adapter directory routes the tokens of samples with their gold answers.

    Args:
        batch_size: samples a forward pass; by default the run's evaluation batch
        begin, advance: as in :func:`lvlm_clorae.analysis.evaluate.evaluate_run`

    Raises:
        UserError: the adapter has no gate, its weights cannot be read, or it does not know a task of the samples
    """
    check_gate(adapter)
    extractor = Extractor.from_pretrained(adapter)
    check_tasks(extractor, samples.dataset_tasks.values())
    lengths = extractor.schema["max_source_length"], extractor.schema["max_target_length"]
    collator = Collator(extractor.processor, samples.dataset_tasks, *lengths)
    size = batch_size or (samples.config.per_device_eval_batch_size if samples.config else DEFAULT_BATCH)
    refs = {name: samples.dataset.refs(name) for name in samples.dataset_tasks}

    def batches(dataset_task: DatasetTask) -> Iterator[dict[str, Tensor]]:
        own = refs[dataset_task.name]
        for start in range(0, len(own), size):
            batch = collator(samples.dataset.__getitems__(own[start : start + size]))
            yield {name: tensor.to(extractor.device) for name, tensor in batch.tensors.items()}
            advance(len(batch.keys))

    begin(samples.split, sum(map(len, refs.values())))
    return Routing(
        samples.split,
        {name: len(found) for name, found in refs.items()},
        layer_locations(extractor.model),
        {
            dataset_task.name: route(extractor.model, dataset_task.task, batches(dataset_task))
            for dataset_task in samples.dataset_tasks.values()
        },
    )


def check_gate(adapter: Path) -> None:
    """Raise UserError unless the layers of an adapter directory have a gate. Reads no weights."""
    config, path = None, adapter / peft.utils.CONFIG_NAME
    if path.is_file():
        try:
            config = peft.PeftConfig.from_pretrained(str(adapter))
        except KeyError as error:
            raise UserError(f"{path}: {error} is not registered. Import the package with this method.") from None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}).") from None
    if isinstance(config, LoRAMoEConfig) or (isinstance(config, CLoRAEConfig) and config.use_gate):
        return
    method = str(config.peft_type).rpartition(".")[2].lower() if config else "full"
    off = " with use_gate, use_universal or use_experts off" if isinstance(config, CLoRAEConfig) else ""
    raise UserError(
        f"{adapter}: {method}{off} has no gate over experts of tasks. Give a run of --adapter clorae or loramoe."
    )


def layer_locations(model: Any) -> dict[str, LayerLocation]:
    """Positions of the adapted layers of a PEFT model, by name."""
    found = {}
    for name, layer in model.adapted_layers().items():
        stack = CROSS if layer.reads_encoder else DECODER if layer.masks.is_decoder else ENCODER
        if not getattr(model.config, "is_encoder_decoder", False):
            stack = MODEL
        numbered = re.search(r"\.(\d+)\.(.+)", name)  # the block has the first number: encoder.block.3.layer.0.Self...
        found[name] = LayerLocation(stack, *((int(numbered[1]), numbered[2]) if numbered else (0, name)))
    return found


@torch.no_grad()
def route(model: Any, task: str, batches: Iterator[dict[str, Tensor]]) -> dict[str, dict[str, Tally]]:
    """Count by layer and token type how a PEFT model with a gate routes batches of one task, without padding."""
    adapter, layers, locations = model.peft_config[model.active_adapter], model.adapted_layers(), layer_locations(model)
    model.eval()
    model.set_task(task)
    sums = {name: torch.zeros(len(TOKEN_TYPES), len(Tally()), dtype=torch.float64) for name in layers}
    for batch in batches:
        model(**batch)
        for name, layer in layers.items():
            assert layer.gate_weights is not None
            weights = layer.gate_weights[0]  # [B, S, experts]
            if isinstance(adapter, LoRAMoEConfig):  # the experts of the task's group
                weights = weights[..., adapter.tasks.index(task) :: len(adapter.tasks)]
            weights = weights.sum(-1)
            decoder = locations[name].stack == DECODER
            types = answer_token_types(batch) if decoder else input_token_types(model.config, batch, weights.shape[1])
            sums[name] += count(weights, types).cpu()
    return {
        name: dict(zip(TOKEN_TYPES, (Tally(*row) for row in rows.tolist()), strict=True)) for name, rows in sums.items()
    }


def count(weights: Tensor, types: Tensor) -> Tensor:
    """Count tokens by type: the values of :class:`Tally` ``[K, 3]`` from task weights and types ``[B, S]``."""
    weights = weights.double()
    given = (weights > 0.5).double() + 0.5 * (weights == 0.5)
    values = torch.stack([torch.ones_like(weights), given, weights], -1)
    return torch.stack([values[types == number].sum(0) for number in range(len(TOKEN_TYPES))])
