"""Write the computed tables of docs/cost.md and docs/scaling.md, between the comments that name them.

python -m tools.docs_tables docs/cost.md docs/scaling.md
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvlm_clorae.adapters.methods.clorae.config import CLoRAEConfig
from lvlm_clorae.analysis.cost import GIB, describe
from lvlm_clorae.analysis.zero import SHIPPED, Zero, memory
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import make_config
from tools import TASKS
from tools.flops import Base, Cost
from tools.methods import cells, count_systems, figures, systems
from tools.scaling import LINKS, Pace, Plan, make_plan, pace
from tools.traffic import sent, traffic

COST_BASES = {"base": "flan-t5-base", "large": "flan-t5-large", "xl": "flan-t5-xl", "llava": "llava-1.5-7b"}
PAPER = {"max_source_length": 256, "max_target_length": 128}
SHORT = {"max_source_length": 128, "max_target_length": 32}
"""Lengths of docs/scaling.md, beside the paper's."""
SCALING_BASES: dict[str, dict[str, Any]] = {
    "flan-t5-xl": {"model": "flan-t5-xl", "lora_rank": 128},
    "llava-1.5-7b": {"model": "llava-1.5-7b"},
}
RANKS = (1, 2, 8, 64, 1024)
PACE_RANKS = (8, 64, 1024)
MICRO_BATCHES = (2, 16)


def cost_tables() -> dict[str, str]:
    """Tables of docs/cost.md by name, as Markdown."""
    found = {}
    for name, model in COST_BASES.items():
        config = make_config({"model": model, **PAPER})
        head, *rows = cells(figures(count_systems(config, TASKS), config))
        found[name] = markdown(head, rows)
    configs = [
        make_config({"model": COST_BASES[name], **more}) for name in ("base", "large") for more in (PAPER, SHORT)
    ]
    columns, parts = ["of LoRA's operations, %"], dict[str, list[str]]()
    for config in configs:
        columns.append(
            f"{config.model.removeprefix('flan-t5-')}, {config.max_source_length} + {config.max_target_length}"
        )
        for part, share in extra_operations(config).items():
            parts.setdefault(part, [part]).append(share)
    return {**found, "extra": markdown(columns, list(parts.values()))}


def extra_operations(config: TrainConfig) -> dict[str, str]:
    """Operations that C-LoRAE adds to LoRA, in percent of LoRA's by part: ``forward / forward and backward``.

    LoRA of rank r + r_e is the cost of the two experts' products alone.
    """
    base, named = Base(config), systems(config)
    expert_r = CLoRAEConfig(r=config.lora_rank, tasks=list(TASKS)).expert_r
    assert expert_r is not None  # the config resolves it

    def lora(rank: int) -> Cost:
        return base.count(replace(named["LoRA"], lora_rank=rank), TASKS)

    start, both_experts = lora(config.lora_rank), lora(config.lora_rank + expert_r)
    no_mim, whole = (base.count(named[name], TASKS) for name in ("no MIM", "C-LoRAE"))
    steps = {
        f"a task expert of rank r/{len(TASKS)}": both_experts - start,
        "the gate": no_mim - both_experts,
        "MIM": whole - no_mim,
        "all": whole - start,
    }
    return {
        part: f"{100 * step.forward / start.forward:.2f} / {100 * step.both / start.both:.2f}"
        for part, step in steps.items()
    }


def scaling_tables() -> dict[str, str]:
    """Tables of docs/scaling.md by name, as Markdown."""
    plans = scaling_plans()
    return {
        "weights": _weights(plans),
        "memory": _by_ranks(plans, lambda plan: f"{sum(memory(plan.weights, plan.step)[0].values()) / GIB:.2f}"),
        "bytes": _by_ranks(plans, lambda plan: f"{sent(traffic(plan.weights, plan.step), plan.step.ranks) / 1e9:.3f}"),
        "pace": _paces(plans),
    }


def scaling_plans() -> dict[str, Plan]:
    """A plan on one rank for each base and type of its frozen weights."""
    found = {}
    for name, settings in SCALING_BASES.items():
        model = describe(make_config(settings), TASKS)
        for dtype, more in {"bf16": {}, "int8": {"load_in_8bit": True}}.items():
            config = make_config({**settings, **more})
            found[f"{name}, {dtype}"] = make_plan(model, config, 1, Zero.read({"stage": 2, **SHIPPED}))
    return found


def _at(plan: Plan, ranks: int, stage: int, **more: Any) -> Plan:
    """The plan on this number of ranks with the shipped settings of a stage."""
    zero = Zero.read({"stage": stage, **SHIPPED})
    return replace(plan, step=replace(plan.step, ranks=ranks, zero=zero), **more)


def _stages(name: str) -> Sequence[int]:
    return (2,) if "int8" in name else (2, 3)  # ZeRO-3 does not support a quantised base


def _weights(plans: dict[str, Plan]) -> str:
    rows = []
    for name, plan in plans.items():
        frozen = [weight for weight in plan.weights if not weight.trained]
        trained = sum(weight.numel for weight in plan.weights if weight.trained)
        numel, stored = sum(weight.numel for weight in frozen), sum(weight.bytes for weight in frozen)
        rows.append((name, f"{numel / 1e9:.3f}", f"{stored / GIB:.2f}", f"{trained / 1e6:.1f}"))
    return markdown(("base", "frozen, 10^9", "frozen, GiB", "trained, 10^6"), rows)


def _by_ranks(plans: dict[str, Plan], cell: Callable[[Plan], str]) -> str:
    rows = [
        (name, f"ZeRO-{stage}", *(cell(_at(plan, ranks, stage)) for ranks in RANKS))
        for name, plan in plans.items()
        for stage in _stages(name)
    ]
    return markdown(("base", "", *(f"{ranks} GPU{'s' if ranks > 1 else ''}" for ranks in RANKS)), rows)


def _paces(plans: dict[str, Plan]) -> str:
    rows = []
    for name, plan in plans.items():
        for stage in _stages(name):
            for samples in MICRO_BATCHES:
                row = [name, f"ZeRO-{stage}", str(samples)]
                for number, node in enumerate(LINKS.values()):
                    found = [pace(_at(plan, ranks, stage, micro_batch=samples), node) for ranks in PACE_RANKS]
                    if number == 0:
                        row += [f"{found[0].computing:.3f}", _efficiency(found[0])]  # 8 GPUs use no network
                    row += [_efficiency(one) for one in found[1:]]
                rows.append(row)
    columns = ["base", "", "samples", "computing, s", "8 GPUs"]
    columns += [f"{ranks}, {link}" for link in LINKS for ranks in PACE_RANKS[1:]]
    return markdown(columns, rows)


def _efficiency(one: Pace) -> str:
    return f"{100 * one.plain:.0f} / {100 * one.overlapped:.0f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def fill(page: str, tables: dict[str, str]) -> str:
    """Insert tables into a page. Raises KeyError for a place without a table."""
    place = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}", page)


PAGES = {"cost.md": cost_tables, "scaling.md": scaling_tables}


def main(argv: list[str] | None = None) -> None:
    """Write the tables into the pages given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE", help=" or ".join(PAGES))
    for path in parser.parse_args(argv).pages:
        if path.name not in PAGES:
            parser.error(f"{path}: no table of this page is computed")
        write_text_atomic(path, fill(path.read_text(encoding="utf-8"), PAGES[path.name]()))


if __name__ == "__main__":
    main()
