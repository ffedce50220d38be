"""Cost of all methods and ablations beside the paper's Table 5: operations and trained state (docs/cost.md).

python -m tools.methods --model flan-t5-large --lora_rank 64
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lvlm_clorae.analysis.cost import GIB
from lvlm_clorae.analysis.tables import Sheet
from lvlm_clorae.arguments import Parser
from lvlm_clorae.console import make_console
from lvlm_clorae.training.config import AdapterArguments, ModelArguments, TrainConfig
from lvlm_clorae.training.config_loading import add_settings, make_config, settings_of
from tools import TASKS, exit_on_error
from tools.flops import Base, Cost
from tools.paper import paper_row

OPTIMIZER_BYTES = 12  # a trained parameter: an fp32 master weight and Adam's two fp32 moments
_COLUMNS = {
    "trained": ("trained, M", lambda x: f"{x / 1e6:.2f}"),
    "paper_trained_millions": ("paper", lambda x: f"{x:.1f}"),
    "forward_flops": ("forward, GFLOPs", lambda x: f"{x / 1e9:,.1f}"),
    "paper_forward_gflops": ("paper", lambda x: f"{x:.1f}"),
    "forward_by_lora": ("vs LoRA", lambda x: f"{x:.4f}"),
    "paper_forward_by_lora": ("paper", lambda x: f"{x:.3f}"),
    "both_flops": ("forward + backward, GFLOPs", lambda x: f"{x / 1e9:,.1f}"),
    "both_by_lora": ("vs LoRA", lambda x: f"{x:.4f}"),
    "gradient_bytes": ("gradients, GiB", lambda x: f"{x / GIB:.3f}"),
    "optimizer_bytes": ("optimizer, GiB", lambda x: f"{x / GIB:.3f}"),
}


def systems(config: TrainConfig) -> dict[str, TrainConfig]:
    """The systems of the paper's Table 5, later baselines and the ablations of its Table 3, with the run's settings."""
    beta = config.beta or TrainConfig.beta
    clorae = replace(config, adapter="clorae", use_universal=True, use_experts=True, use_gate=True, beta=beta)
    return {
        "full": replace(config, adapter="full"),
        "LoRA": replace(config, adapter="lora"),
        "MoSLoRA": replace(config, adapter="moslora"),
        "LoRAMoE": replace(config, adapter="loramoe", beta=beta),
        "MTL-LoRA": replace(config, adapter="mtllora"),
        "HydraLoRA": replace(config, adapter="hydralora"),
        "C-LoRAE": clorae,
        "only universal": replace(clorae, use_experts=False),
        "only task experts": replace(clorae, use_universal=False),
        "no gate": replace(clorae, use_gate=False),
        "no MIM": replace(clorae, beta=0.0),
    }


def count_systems(config: TrainConfig, tasks: Sequence[str]) -> dict[str, Cost]:
    """Count each of :func:`systems` on a full micro-batch. Raises UserError as :class:`Base`."""
    base = Base(config)
    return {name: base.count(system, tasks) for name, system in systems(config).items()}


def figures(costs: dict[str, Cost], config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Figures of each system, with operations a sample; ``bf16`` auto counts as bf16. None where the paper has none."""
    lora = costs["LoRA"]
    itemsize = 4 if config.bf16 is False else 2
    published = {name: _published(system) for name, system in systems(config).items()}
    samples = config.per_device_train_batch_size
    found: dict[str, dict[str, Any]] = {}
    for name, cost in costs.items():
        trained, forward = published[name]
        found[name] = {
            "trained": cost.trained,
            "paper_trained_millions": trained,
            "forward_flops": cost.forward / samples,
            "paper_forward_gflops": forward,
            "forward_by_lora": cost.forward / lora.forward,
            "paper_forward_by_lora": forward / base if forward and (base := published["LoRA"][1]) else None,
            "both_flops": cost.both / samples,
            "both_by_lora": cost.both / lora.both,
            "gradient_bytes": itemsize * cost.trained,
            "optimizer_bytes": OPTIMIZER_BYTES * cost.trained,
        }
    return found


def _published(system: TrainConfig) -> tuple[float | None, float | None]:
    """Trained parameters and forward operations in the paper, if the rank is the paper's."""
    row = paper_row(system)
    return (row.trained, row.forward) if row and row.settings().lora_rank == system.lora_rank else (None, None)


def cells(found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Format :func:`figures` as a table with its header first, without columns that are empty."""
    known = [name for name in _COLUMNS if any(row[name] is not None for row in found.values())]
    rows = [("system", *(_COLUMNS[name][0] for name in known))]
    for system, row in found.items():
        rows.append((system, *("" if row[name] is None else _COLUMNS[name][1](row[name]) for name in known)))
    return rows


def render_systems(found: dict[str, dict[str, Any]], config: TrainConfig) -> Sheet:
    """Render :func:`figures` for a terminal."""
    title = (
        f"{config.model}, rank {config.lora_rank}, {config.per_device_train_batch_size} samples a micro-batch, each of "
        f"an image (unless text only), {config.max_source_length} prompt and {config.max_target_length} answer tokens"
    )
    head, *rows = cells(found)
    return Sheet(title, list(head), [list(row) for row in rows])


def main(argv: list[str] | None = None) -> None:
    """Print the figures of all methods. A mistake that the user can fix ends with exit code 2."""
    parser = Parser(
        prog="python -m tools.methods",
        description="Compare the cost of all methods (docs/cost.md).",
        argument_default=argparse.SUPPRESS,
    )
    add_settings(parser, (ModelArguments, AdapterArguments))
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="NAME", help="tasks, one LoRA expert each")
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    for name in ("per_device_train_batch_size", "beta"):
        parser.add_argument(f"--{name}", metavar="N", help="as in training")
    with exit_on_error():
        arguments = parser.parse_args(argv)
        config = make_config(settings_of(vars(arguments)))
        found = figures(count_systems(config, arguments.tasks), config)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        make_console(width=160).print(render_systems(found, config))


if __name__ == "__main__":
    main()
