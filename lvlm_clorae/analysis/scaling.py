"""What a run on many ranks keeps, sends and, from stated speeds, how much of one rank's pace each of them holds.

Bytes are formulas that two real ranks confirm (tests/distributed/test_scaling.py); seconds are an estimate from the
assumptions below, which nothing here has measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_clorae.analysis.memory import KINDS, memory
from lvlm_clorae.analysis.traffic import RING, Collective, Setting, Zero, sent, traffic
from lvlm_clorae.analysis.weights import Weight, list_weights
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.deepspeed_config import read_deepspeed_file, resolve

if TYPE_CHECKING:
    from rich.table import Table

SHIPPED: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000}
"""What the files in ds_configs/ set; for ZeRO-3 they repeat DeepSpeed's defaults besides."""

FLOPS = 0.4 * 312e12
"""Assumed: 40 % of an A100's bf16 peak, operations a second."""
TEXT, ANSWER = 128, 32
"""Assumed: tokens of a prompt's text and of an answer."""
GPUS_PER_NODE = 8
INSIDE = 450e9
"""Assumed: bytes a second that a GPU sends to the others of its node (NVLink)."""
CALL, HOP_INSIDE, HOP_OUTSIDE = 10e-6, 1e-6, 5e-6
"""Assumed: seconds for a call, for each further GPU of the node, and for each doubling of the nodes."""
LINKS = {"400 Gb/s a GPU": 8 * 50e9, "200 Gb/s a node": 25e9, "25 GbE a node": 3.125e9}
"""A network -> bytes a second that leave a node."""


@dataclass(frozen=True)
class Plan:
    """A run to be counted.

    Args:
        weights: of the adapted model
        setting: ranks, ZeRO and what else decides its bytes
        micro_batch: samples a rank and micro-step
        patches: tokens of a picture
    """

    weights: list[Weight]
    setting: Setting
    micro_batch: int
    patches: int


def choose_zero(config: TrainConfig, ranks: int | None, stage: int | None, file: str | None) -> Zero:
    """The ZeRO settings of a command line: those of its DeepSpeed file, else a stage's as they are shipped.

    Raises:
        UserError: a stage or a file but no number of ranks; a number, a stage or a file that is none; stage and file
            that contradict one another; a quantised base under ZeRO-3.
    """
    if ranks is None:
        if stage is not None or file is not None:
            raise UserError("--zero-stage and --deepspeed say how ranks share a model: give --world-size too.")
        return Zero()
    if ranks < 1:
        raise UserError(f"--world-size {ranks}: give at least 1.")
    for name in ("micro_batch", "accumulation"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} = {getattr(config, name)}: give at least 1.")
    if stage is not None and stage not in (1, 2, 3):
        raise UserError(f"--zero-stage {stage} does not exist: choose 1, 2 or 3.")
    section: dict[str, Any] = {"stage": 2 if stage is None else stage, **SHIPPED}
    if file is not None:
        batch = replace(config, deepspeed=file)
        content = resolve(read_deepspeed_file(Path(file)), batch, ranks, config.precision != "fp32", file)
        section = content["zero_optimization"]
        if stage not in (None, section["stage"]):
            raise UserError(f"{file} has ZeRO-{section['stage']}, --zero-stage says {stage}: leave one of them out.")
    if section["stage"] == 3 and (config.load_in_8bit or config.load_in_4bit):
        raise UserError("A quantised base does not go with ZeRO-3: take --zero-stage 2 (docs/models.md).")
    return Zero.read(section)


def make_plan(model: Any, config: TrainConfig, ranks: int, zero: Zero) -> Plan:
    """The plan of an adapted model, which may be on the meta device; ``precision`` auto counts as bf16."""
    bits = 8 if config.load_in_8bit else 4 if config.load_in_4bit else 16
    size = 4 if config.precision == "fp32" else 2
    setting = Setting(ranks, zero, config.accumulation, size, config.gradient_checkpointing, side_terms(model, config))
    grids = [module.grid for module in model.modules() if hasattr(module, "trunk")]
    patches = grids[0] ** 2 if grids else 576  # of another family's tower: LLaVA-1.5's number
    return Plan(list_weights(model, size, bits), setting, config.micro_batch, patches)


def side_terms(model: Any, config: TrainConfig) -> int:
    """How many numbers the ranks add up for the adapter's own loss in a micro-step."""
    if config.beta <= 0 or config.adapter not in ("clorae", "loramoe"):
        return 0
    each = 1 if config.adapter == "clorae" else model.peft_config["default"].num_experts
    return each * len(model.base_model.adapted_layers())


def flops(plan: Plan) -> float:
    """Operations of a micro-step on one rank.

    Two a token and weight forward, as many for the gradient of the input, for that of a trained weight, and for
    computing a checkpointed block anew. Attention's own products are not counted; a task expert that is not in use is.
    """
    joined = not any(weight.stack == "encoder" for weight in plan.weights)
    picture, text = plan.patches, plan.patches + TEXT
    tokens = {"tower": picture, "projector": picture, "encoder": text, "decoder": text + ANSWER if joined else ANSWER}
    total = 0.0
    for weight in plan.weights:
        if not weight.matrix or weight.stack not in tokens:
            continue
        passes = 2 if weight.stack == "tower" else 6 if weight.trained else 4
        passes += 2 if plan.setting.checkpointing and weight.block else 0
        reads_encoder = ".EncDecAttention.k." in weight.name or ".EncDecAttention.v." in weight.name
        total += passes * weight.numel * (text if reads_encoder else tokens[weight.stack])
    return plan.micro_batch * total


def seconds(collective: Collective, ranks: int, node: float) -> float:
    """Time of a collective: what its calls wait, and what its bytes take.

    Args:
        node: bytes a second that leave a node. A ring through all GPUs of a node leaves it once, so that its share of
            the payload passes the node's network as a whole.
    """
    nodes = math.ceil(ranks / GPUS_PER_NODE)
    hops = HOP_INSIDE * (min(ranks, GPUS_PER_NODE) - 1) + HOP_OUTSIDE * math.ceil(math.log2(nodes))
    bandwidth = INSIDE if nodes == 1 else min(INSIDE, node)
    return collective.calls * (CALL + RING[collective.kind] * hops) + collective.sent(ranks) / bandwidth


@dataclass(frozen=True)
class Pace:
    """Seconds of an optimizer step.

    Args:
        computing: of one rank alone
        talking: of all collectives, one after the other
        exposed: of what of it nothing hides, at best
    """

    computing: float
    talking: float
    exposed: float

    @property
    def plain(self) -> float:
        """Share of one rank's pace that each rank holds where nothing overlaps."""
        return self.computing / (self.computing + self.talking)

    @property
    def overlapped(self) -> float:
        """The same where gradients are reduced during backward and weights gathered during all of the computing."""
        return self.computing / (self.computing + self.exposed)


def pace(plan: Plan, node: float) -> Pace:
    """The pace on nodes from which so many bytes a second leave."""
    setting = plan.setting
    found = traffic(plan.weights, setting)
    computing = setting.accumulation * flops(plan) / FLOPS
    spent = {one.purpose: 0.0 for one in found}
    for one in found:
        spent[one.purpose] += seconds(one, setting.ranks, node)
    talking = sum(spent.values())
    gradients = spent.get("gradients", 0.0)
    hidden = sum(seconds(one, setting.ranks, node) for one in found if one.overlaps)
    behind = max(0.0, gradients - computing / 2, hidden - computing)  # backward is half of the computing
    return Pace(computing, talking, talking - hidden + behind)


def to_dict(plan: Plan) -> dict[str, Any]:
    """All that is counted, for JSON: bytes and seconds."""
    setting = plan.setting
    kept, found = memory(plan.weights, setting), traffic(plan.weights, setting)
    return {
        "ranks": setting.ranks,
        "zero": vars(setting.zero),
        "accumulation": setting.accumulation,
        "micro_batch": plan.micro_batch,
        "memory": {"gpu": kept.gpu, "host": kept.host},
        "collectives": [{**vars(one), "sent": one.sent(setting.ranks)} for one in found],
        "sent": sent(found, setting.ranks),
        "pace": {
            name: {**vars(one), "plain": one.plain, "overlapped": one.overlapped}
            for name, one in ((name, pace(plan, node)) for name, node in LINKS.items())
        },
    }


def render(plan: Plan) -> list[Table]:
    """Tables for a terminal: memory of a rank, what it sends in a step, its pace."""
    from rich.table import Table

    setting = plan.setting
    ranks = f"{setting.ranks} rank{'s' if setting.ranks > 1 else ''}, ZeRO-{setting.zero.stage}"
    kept, found = memory(plan.weights, setting), traffic(plan.weights, setting)
    there = [kind for kind in KINDS if kind in kept.gpu or kind in kept.host]
    rows = [(kind, *(_mib(where.get(kind, 0)) for where in (kept.gpu, kept.host))) for kind in there]
    stored = _table(Table, f"a rank without activations, {ranks}", ("kept", "GPU MiB", "host MiB"), rows)
    stored.add_row("all", *map(_mib, kept.total()))

    rows = [
        (one.purpose, one.kind, f"{one.calls:,}", _mib(one.payload), _mib(one.sent(setting.ranks))) for one in found
    ]
    title = f"an optimizer step of {setting.accumulation} micro-step(s)"
    said = _table(Table, title, ("for", "collective", "calls", "payload MiB", "sent by a rank MiB"), rows)
    said.add_row("all", "", f"{sum(one.calls for one in found):,}", "", _mib(sent(found, setting.ranks)))

    paces = {name: pace(plan, node) for name, node in LINKS.items()}
    rows = [
        (name, f"{one.computing:.3f}", f"{one.talking:.3f}", _percent(one.plain), _percent(one.overlapped))
        for name, one in paces.items()
    ]
    columns = ("network", "computing s", "talking s", "efficiency", "overlapped")
    return [stored, said, _table(Table, "estimated pace (docs/scaling.md says from what)", columns, rows)]


def _table(kind: type[Table], title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = kind(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _mib(number: float) -> str:
    return f"{number / 2**20:,.1f}" if number >= 2**20 / 10 or not number else f"{number / 2**20:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
