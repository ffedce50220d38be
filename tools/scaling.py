"""Estimate communication volume and throughput of a run on many ranks (docs/scaling.md).

    python -m tools.scaling --model flan-t5-xl --world_size 8 --zero_stage 3

Bytes are formulas (traffic.py). Seconds are an estimate from the assumptions below, which were not measured.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from lvlm_clorae.analysis.cost import describe, mib, storage
from lvlm_clorae.analysis.tables import Sheet
from lvlm_clorae.analysis.zero import Weight, Zero, choose_zero, list_weights
from lvlm_clorae.cli.cost import make_parser
from lvlm_clorae.console import make_console
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.adapters import method_of
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import make_config, settings_of
from tools import exit_on_error
from tools.traffic import RING, Collective, Step, sent, traffic

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
    matrices: frozenset[str]  # names of the weights that multiply tokens, at two FLOPs an element and token
    step: Step
    micro_batch: int  # samples a rank and micro-step
    patches: int  # tokens of an image


def make_plan(model: Any, config: TrainConfig, ranks: int, zero: Zero) -> Plan:
    """Plan a run of an adapted model, which may be on the meta device. ``bf16`` auto counts as bf16."""
    size, bits = storage(config)
    kept, terms = (ranks, zero, size, config.gradient_checkpointing), aux_terms(model, config)
    step = Step(*kept, accumulation=config.gradient_accumulation_steps, aux_terms=terms)
    other = 0 if getattr(model, "vision_tower", model) is None else IMAGE_TOKENS
    patches = next((module.grid**2 for module in model.modules() if hasattr(module, "trunk")), other)
    matrices = frozenset(name for name, parameter in model.named_parameters() if parameter.dim() >= 2)
    return Plan(list_weights(model, size, bits), matrices, step, config.per_device_train_batch_size, patches)


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
        if weight.name not in plan.matrices or weight.stack not in tokens:
            continue
        passes = 2 if weight.stack == "tower" else 6 if weight.trained else 4
        passes += 2 if plan.step.checkpointing and weight.block else 0
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
    found = traffic(plan.weights, plan.step)
    computing = plan.step.accumulation * flops(plan) / FLOPS
    spent = [seconds(one, plan.step.ranks, node) for one in found]
    gradients = sum(time for one, time in zip(found, spent, strict=True) if one.purpose == "gradients")
    hidden = sum(time for one, time in zip(found, spent, strict=True) if one.overlaps)
    behind = max(0.0, gradients - computing / 2, hidden - computing)  # backward is half of the computation
    return Pace(computing, sum(spent), sum(spent) - hidden + behind)


def to_dict(plan: Plan) -> dict[str, Any]:
    """Communication and pace for JSON, in bytes and seconds."""
    step, found = plan.step, traffic(plan.weights, plan.step)
    paces = {name: pace(plan, node) for name, node in LINKS.items()}
    return {
        "ranks": step.ranks,
        "zero": vars(step.zero),
        "accumulation": step.accumulation,
        "micro_batch": plan.micro_batch,
        "collectives": [{**vars(one), "sent": one.sent(step.ranks)} for one in found],
        "sent": sent(found, step.ranks),
        "pace": {name: {**vars(one), "plain": one.plain, "overlapped": one.overlapped} for name, one in paces.items()},
    }


def render(plan: Plan) -> list[Sheet]:
    """Tables for a terminal: communication of a step, estimated pace."""
    step, found = plan.step, traffic(plan.weights, plan.step)
    title = f"communication of an optimizer step of {step.accumulation} micro-step(s), {step}"
    calls = Sheet(title, ["for", "collective", "calls", "payload MiB", "sent by a rank MiB"])
    for one in found:
        calls.rows.append([one.purpose, one.kind, f"{one.calls:,}", mib(one.payload), mib(one.sent(step.ranks))])
    calls.rows.append(["all", "", f"{sum(one.calls for one in found):,}", "", mib(sent(found, step.ranks))])

    columns = ["network", "computation s", "communication s", "efficiency", "with overlap"]
    paces = Sheet("estimated pace (assumptions in docs/scaling.md)", columns)
    for name, node in LINKS.items():
        its = pace(plan, node)
        shares = f"{100 * its.plain:.0f} %", f"{100 * its.overlapped:.0f} %"
        paces.rows.append([name, f"{its.computing:.3f}", f"{its.talking:.3f}", *shares])
    return [calls, paces]


def main(argv: list[str] | None = None) -> None:
    """Print the estimates. A mistake that the user can fix ends with exit code 2."""
    parser = make_parser("python -m tools.scaling", "Estimate communication volume and throughput (docs/scaling.md).")
    parser.add_argument("--beta", metavar="X", help="weight of the auxiliary loss; 0 disables it")
    with exit_on_error():
        arguments = parser.parse_args(argv)
        if arguments.world_size is None:
            raise UserError("The number of ranks is missing. Add --world_size.")
        config = make_config(settings_of(vars(arguments)))
        zero = choose_zero(config, arguments.world_size, arguments.zero_stage, getattr(arguments, "deepspeed", None))
        plan = make_plan(describe(config, arguments.tasks), config, arguments.world_size, zero)
    if arguments.json:
        print(json.dumps(to_dict(plan), indent=1))
    else:
        make_console().print(*render(plan))


if __name__ == "__main__":
    main()
