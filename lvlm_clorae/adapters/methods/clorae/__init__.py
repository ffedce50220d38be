"""C-LoRAE: one universal and N task LoRA experts under a token gate (IJCAI 2025, arXiv 2505.06303)."""

from typing import Any

import peft  # noqa: F401  first: the end of its import registers the methods, which imports the modules below

from lvlm_clorae.adapters.register import AdapterMethod

from .config import CLoRAEConfig as CLoRAEConfig
from .experts import CLoRAEExperts as CLoRAEExperts
from .model import CLoRAEModel as CLoRAEModel


def _make_config(common: dict[str, Any], run: Any, tasks: list[str]) -> CLoRAEConfig:
    parts = {name: getattr(run, name) for name in ("use_universal", "use_experts", "use_gate")}
    return CLoRAEConfig(**common, **parts, tasks=tasks, expert_r=run.lora_expert_rank, use_mim=run.beta > 0)


METHOD = AdapterMethod(
    "clorae", CLoRAEConfig, CLoRAEModel, _make_config, knows_tasks=True, aux_loss="mim", aux_numbers=1
)
