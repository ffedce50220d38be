"""Estimate per-GPU memory, communication volume and throughput of a run on many ranks (docs/scaling.md).

Bytes are formulas (zero.py). Seconds are an estimate from the assumptions below, which were not measured.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from lvlm_clorae.analysis.tables import Sheet
from lvlm_clorae.analysis.zero import RING, Collective, Setting, Weight, Zero, list_weights, memory, sent, traffic
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.adapters import method_of
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.deepspeed_config import find_deepspeed_file, read_deepspeed_file, resolve

# Settings of the files in ds_configs/
SHIPPED: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000}
# Assumptions, which docs/scaling.md explains
FLOPS = 0.4 * 312e12  # throughput: 40 % of an A100's bf16 peak [operations a second]
TEXT, ANSWER = 128, 32  # length of a prompt's text and of an answer [tokens]
IMAGE_TOKENS = 576  # tokens of an image for a tower of another family: LLaVA-1.5's number
GPUS_PER_NODE = 8
INSIDE = 450e9  # bandwidth from a GPU to the others of its node (NVLink) [bytes a second]
# Bandwidth out of a node by network [bytes a second]
LINKS = {"400 Gb/s a GPU": 8 * 50e9, "200 Gb/s a node": 25e9, "25 GbE a node": 3.125e9}
CALL, HOP_INSIDE, HOP_OUTSIDE = 10e-6, 1e-6, 5e-6  # latency of a call, a further GPU, a doubling of the nodes [s]


@dataclass(frozen=True)
class Plan:
    """A run whose scaling is estimated."""

    weights: list[Weight]  # of the adapted model
    setting: Setting
    micro_batch: int  # samples a rank and micro-step
    patches: int  # tokens of an image


def choose_zero(config: TrainConfig, ranks: int | None, stage: int | None, file: str | None) -> Zero:
    """Choose the ZeRO settings of a command line: those of its DeepSpeed file, else the shipped ones of a stage.

    Raises:
        UserError: a number, stage or file is invalid or missing; stage and file contradict each other; or a quantized
            base is combined with ZeRO-3
    """
    if ranks is None:
        if stage is not None or file is not None:
            raise UserError("--zero_stage and --deepspeed need the number of ranks. Add --world_size.")
        return Zero()
    if ranks < 1:
        raise UserError(f"--world_size {ranks}: give at least 1.")
    if stage is not None and stage not in (1, 2, 3):
        raise UserError(f"--zero_stage {stage}: choose 1, 2 or 3.")
    section: dict[str, Any] = {"stage": 2 if stage is None else stage, **SHIPPED}
    if file is not None:
        batch = replace(config, deepspeed=file)
        content = resolve(read_deepspeed_file(find_deepspeed_file(file)), batch, ranks, config.bf16 is not False, file)
        section = content["zero_optimization"]
        if stage not in (None, section["stage"]):
            raise UserError(f"{file} sets ZeRO-{section['stage']}, but --zero_stage {stage} is given. Remove one.")
    if section["stage"] == 3 and (config.load_in_8bit or config.load_in_4bit):
        raise UserError("ZeRO-3 does not support a quantized base. Use --zero_stage 2 (docs/models.md).")
    return Zero.read(section)


def make_plan(model: Any, config: TrainConfig, ranks: int, zero: Zero) -> Plan:
    """Plan a run of an adapted model, which may be on the meta device. ``bf16`` auto counts as bf16."""
    size, bits = storage(config)
    recompute, terms = config.gradient_checkpointing, aux_terms(model, config)
    setting = Setting(ranks, zero, config.gradient_accumulation_steps, size, recompute, terms)
    patches = next((module.grid**2 for module in model.modules() if hasattr(module, "trunk")), IMAGE_TOKENS)
    return Plan(list_weights(model, size, bits), setting, config.per_device_train_batch_size, patches)


def storage(config: TrainConfig) -> tuple[int, int]:
    """Return bytes of an element and bits of a quantised one, 16 without quantisation, for :func:`list_weights`."""
    return 4 if config.bf16 is False else 2, 8 if config.load_in_8bit else 4 if config.load_in_4bit else 16


def aux_terms(model: Any, config: TrainConfig) -> int:
    """Count the numbers that the ranks sum for the adapter's auxiliary loss in a micro-step."""
    method = method_of(config)
    if method is None or config.beta <= 0 or not method.aux_numbers:
        return 0
    return method.aux_numbers * len(model.base_model.adapted_layers())


def flops(plan: Plan) -> float:
    """Estimate the operations of a micro-step on one rank.

    Two operations a token and weight for forward, and as many for the gradient of the input, for that of a trained
    weight, and for recomputing a checkpointed block. Attention scores are not counted; task experts not in use are.
    """
    joined = not any(weight.stack == "encoder" for weight in plan.weights)
    image, text = plan.patches, plan.patches + TEXT
    tokens = {"tower": image, "projector": image, "encoder": text, "decoder": text + ANSWER if joined else ANSWER}
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
    """Estimate the latency and transfer time [s] of a collective, for ``node`` bytes a second out of a node.

    A ring through all GPUs of a node leaves it once, so the node's network carries one GPU's share of the payload.
    """
    nodes = math.ceil(ranks / GPUS_PER_NODE)
    hops = HOP_INSIDE * (min(ranks, GPUS_PER_NODE) - 1) + HOP_OUTSIDE * math.ceil(math.log2(nodes))
    bandwidth = INSIDE if nodes == 1 else min(INSIDE, node)
    return collective.calls * (CALL + RING[collective.kind] * hops) + collective.sent(ranks) / bandwidth


@dataclass(frozen=True)
class Pace:
    """Time of an optimizer step [s]."""

    computing: float  # computation of one rank
    talking: float  # all collectives, one after the other
    exposed: float  # collectives that no computation hides, at best

    @property
    def plain(self) -> float:
        """Efficiency of each rank, compared to one rank alone, without overlap."""
        return self.computing / (self.computing + self.talking)

    @property
    def overlapped(self) -> float:
        """Efficiency if gradients are reduced during backward and weights gathered during all computation."""
        return self.computing / (self.computing + self.exposed)


def pace(plan: Plan, node: float) -> Pace:
    """Estimate the pace with this bandwidth out of a node [bytes a second]."""
    setting = plan.setting
    found = traffic(plan.weights, setting)
    computing = setting.accumulation * flops(plan) / FLOPS
    spent = [seconds(one, setting.ranks, node) for one in found]
    gradients = sum(time for one, time in zip(found, spent, strict=True) if one.purpose == "gradients")
    hidden = sum(time for one, time in zip(found, spent, strict=True) if one.overlaps)
    behind = max(0.0, gradients - computing / 2, hidden - computing)  # backward is half of the computation
    return Pace(computing, sum(spent), sum(spent) - hidden + behind)


def to_dict(plan: Plan) -> dict[str, Any]:
    """All estimates for JSON, in bytes and seconds."""
    setting = plan.setting
    (gpu, host), found = memory(plan.weights, setting), traffic(plan.weights, setting)
    paces = {name: pace(plan, node) for name, node in LINKS.items()}
    return {
        "ranks": setting.ranks,
        "zero": vars(setting.zero),
        "accumulation": setting.accumulation,
        "micro_batch": plan.micro_batch,
        "memory": {"gpu": gpu, "host": host},
        "collectives": [{**vars(one), "sent": one.sent(setting.ranks)} for one in found],
        "sent": sent(found, setting.ranks),
        "pace": {name: {**vars(one), "plain": one.plain, "overlapped": one.overlapped} for name, one in paces.items()},
    }


def render(plan: Plan) -> list[Sheet]:
    """Tables for a terminal: memory of a rank, communication of a step, estimated pace."""
    setting = plan.setting
    (gpu, host), found = memory(plan.weights, setting), traffic(plan.weights, setting)
    ranks = f"{setting.ranks} rank{'s' if setting.ranks > 1 else ''}, ZeRO-{setting.zero.stage}"
    title = f"a rank without activations, {ranks}"
    kept = Sheet(title, ["type", "GPU MiB", "host MiB"])
    kept.rows = [[name, _mib(gpu.get(name, 0)), _mib(host.get(name, 0))] for name in {**gpu, **host}]
    kept.rows.append(["all", _mib(sum(gpu.values())), _mib(sum(host.values()))])

    title = f"communication of an optimizer step of {setting.accumulation} micro-step(s)"
    calls = Sheet(title, ["for", "collective", "calls", "payload MiB", "sent by a rank MiB"])
    for one in found:
        calls.rows.append([one.purpose, one.kind, f"{one.calls:,}", _mib(one.payload), _mib(one.sent(setting.ranks))])
    calls.rows.append(["all", "", f"{sum(one.calls for one in found):,}", "", _mib(sent(found, setting.ranks))])

    columns = ["network", "computation s", "communication s", "efficiency", "with overlap"]
    paces = Sheet("estimated pace (assumptions in docs/scaling.md)", columns)
    for name, node in LINKS.items():
        its = pace(plan, node)
        shares = f"{100 * its.plain:.0f} %", f"{100 * its.overlapped:.0f} %"
        paces.rows.append([name, f"{its.computing:.3f}", f"{its.talking:.3f}", *shares])
    return [kept, calls, paces]


def _mib(number: float) -> str:
    return f"{number / 2**20:,.1f}" if number >= 2**20 / 10 or not number else f"{number / 2**20:.4f}"
