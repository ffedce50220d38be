"""The tables of docs/cost.md, written into the page between comments that name them.

python -m lvlm_clorae.analysis.cost_page docs/cost.md
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from lvlm_clorae import CLoRAEConfig
from lvlm_clorae.analysis.comparison import cells, compare, figures, systems
from lvlm_clorae.analysis.flops import Base, Cost
from lvlm_clorae.analysis.scaling_page import TASKS, fill, markdown
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.training.config import TrainConfig, make_config

BASES = {"base": "flan-t5-base", "large": "flan-t5-large", "xl": "flan-t5-xl", "llava": "llava-1.5-7b"}
SHORT = {"max_length": 128, "max_answer_length": 32}
"""A sample as docs/scaling.md assumes it, beside the paper's 256 and 128 tokens."""


def tables() -> dict[str, str]:
    """Name -> table in Markdown."""
    found = {}
    for name, model in BASES.items():
        config = make_config({"model": model})
        head, *rows = cells(figures(compare(config, TASKS), config))
        found[name] = markdown(head, rows)
    configs = [make_config({"model": BASES[name], **more}) for name in ("base", "large") for more in ({}, SHORT)]
    found["extra"] = markdown(*_extras(configs))
    return found


def _extras(configs: list[TrainConfig]) -> tuple[list[str], list[list[str]]]:
    """What C-LoRAE adds to LoRA's operations, in percent of those, part by part: ``forward / with backward``."""
    columns = ["of LoRA's operations, %"]
    cells_of: dict[str, list[str]] = {}
    for config in configs:
        columns.append(f"{config.model.removeprefix('flan-t5-')}, {config.max_length} + {config.max_answer_length}")
        for part, cost in extra(config).items():
            cells_of.setdefault(part, []).append(cost)
    return columns, [[part, *column] for part, column in cells_of.items()]


def extra(config: TrainConfig) -> dict[str, str]:
    """One column of that table. LoRA of rank r + r_e tells what the products alone cost."""
    base, named = Base(config), systems(config)
    r, task_r = config.rank, CLoRAEConfig(r=config.rank, tasks=list(TASKS)).expert_r
    assert task_r is not None  # the config resolves it

    def lora(rank: int) -> Cost:
        return base.count(replace(named["LoRA"], rank=rank), TASKS)

    start, both_experts = lora(r), lora(r + task_r)
    no_mim, whole = (base.count(named[name], TASKS) for name in ("no MIM", "C-LoRAE"))
    every = base.count(replace(named["C-LoRAE"], mim_tokens=0), TASKS)
    steps = {
        f"a task expert of rank r/{len(TASKS)}": both_experts - start,
        "the gate": no_mim - both_experts,
        f"MIM of {config.mim_tokens} tokens": whole - no_mim,
        "all": whole - start,
        "all, with MIM of every token": every - start,
    }
    return {
        part: f"{100 * step.forward / start.forward:.2f} / {100 * step.both / start.both:.2f}"
        for part, step in steps.items()
    }


if __name__ == "__main__":
    path = Path(sys.argv[1])
    write_text_atomic(path, fill(path.read_text(encoding="utf-8"), tables()))
