"""The tables of docs/scaling.md, written into the page between comments that name them.

python -m lvlm_clorae.analysis.scaling_page docs/scaling.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvlm_clorae.analysis.memory import memory
from lvlm_clorae.analysis.parameters import GIB, describe
from lvlm_clorae.analysis.scaling import LINKS, SHIPPED, Plan, make_plan, pace
from lvlm_clorae.analysis.traffic import Zero, sent, traffic
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.training.config import make_config

TASKS = ["mner", "mre", "mee"]
BASES: dict[str, dict[str, Any]] = {
    "flan-t5-xl": {"model": "flan-t5-xl", "rank": 128},
    "llava-1.5-7b": {"model": "llava-1.5-7b"},
}
RANKS = (1, 2, 8, 64, 1024)
MANY = (8, 64, 1024)
SAMPLES = (2, 16)
"""Micro-batches whose pace is estimated."""
Plans = dict[str, Plan]


def plans() -> Plans:
    """A plan a base and type of its frozen weights, on one rank."""
    found = {}
    for name, settings in BASES.items():
        model = describe(make_config(settings), TASKS)
        for kind, more in {"bf16": {}, "int8": {"load_in_8bit": True}}.items():
            config = make_config({**settings, **more})
            found[f"{name}, {kind}"] = make_plan(model, config, 1, Zero.read({"stage": 2, **SHIPPED}))
    return found


def at(plan: Plan, ranks: int, stage: int, **more: Any) -> Plan:
    """The plan on so many ranks under the shipped settings of a stage."""
    zero = Zero.read({"stage": stage, **SHIPPED})
    return replace(plan, setting=replace(plan.setting, ranks=ranks, zero=zero), **more)


def tables(found: Plans) -> dict[str, str]:
    """Name -> table in Markdown."""
    return {
        "weights": _weights(found),
        "memory": _by_ranks(found, lambda plan: f"{memory(plan.weights, plan.setting).total()[0] / GIB:.2f}"),
        "bytes": _by_ranks(found, lambda plan: _gb(sent(traffic(plan.weights, plan.setting), plan.setting.ranks))),
        "pace": _pace(found),
    }


def _stages(name: str) -> Sequence[int]:
    return (2,) if "int8" in name else (2, 3)  # a quantised base does not go with ZeRO-3


def _weights(found: Plans) -> str:
    rows = []
    for name, plan in found.items():
        frozen = [weight for weight in plan.weights if not weight.trained]
        trained = sum(weight.numel for weight in plan.weights if weight.trained)
        numel, stored = sum(weight.numel for weight in frozen), sum(weight.bytes for weight in frozen)
        rows.append((name, f"{numel / 1e9:.3f}", f"{stored / GIB:.2f}", f"{trained / 1e6:.1f}"))
    return markdown(("base", "frozen, 10^9", "frozen, GiB", "trained, 10^6"), rows)


def _by_ranks(found: Plans, cell: Any) -> str:
    rows = [
        (name, f"ZeRO-{stage}", *(cell(at(plan, ranks, stage)) for ranks in RANKS))
        for name, plan in found.items()
        for stage in _stages(name)
    ]
    return markdown(("base", "", *(f"{ranks} GPU{'s' if ranks > 1 else ''}" for ranks in RANKS)), rows)


def _pace(found: Plans) -> str:
    rows = []
    for name, plan in found.items():
        for stage in _stages(name):
            for samples in SAMPLES:
                cells = []
                for link, node in LINKS.items():
                    paces = [pace(at(plan, ranks, stage, micro_batch=samples), node) for ranks in MANY]
                    if link == next(iter(LINKS)):
                        cells += [f"{paces[0].computing:.3f}", _share(paces[0])]  # 8 GPUs use no network
                    cells += [_share(one) for one in paces[1:]]
                rows.append((name, f"ZeRO-{stage}", str(samples), *cells))
    columns = ["base", "", "samples", "computing, s", "8 GPUs"]
    columns += [f"{ranks}, {link}" for link in LINKS for ranks in MANY[1:]]
    return markdown(columns, rows)


def _share(one: Any) -> str:
    return f"{100 * one.plain:.0f} / {100 * one.overlapped:.0f}"


def _gb(number: float) -> str:
    return f"{number / 1e9:.3f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def fill(page: str, found: dict[str, str]) -> str:
    """The page with each table in its place. Raises KeyError for a place that no table has."""
    place = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda match: f"{match[1]}\n{found[match[2]]}\n{match[3]}", page)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    write_text_atomic(path, fill(path.read_text(encoding="utf-8"), tables(plans())))
