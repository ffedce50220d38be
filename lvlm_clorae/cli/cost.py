"""``lvlm-clorae cost``: count parameters, estimate memory of a GPU."""

import argparse
import json
from typing import Any

from lvlm_clorae.arguments import Parser, positive
from lvlm_clorae.console import make_console
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import AdapterArguments, ModelArguments
from lvlm_clorae.training.config_loading import add_settings, make_config, settings_of

PER_RANK = {
    "per_device_train_batch_size": "samples per rank and micro-step (the recipe's)",
    "gradient_accumulation_steps": "micro-steps per optimizer step (1)",
}
"""Settings that only the cost of many ranks depends on, and their help."""


def main(argv: list[str]) -> int:
    """Print the cost of a base with its adapter, without weights."""
    text = "Build a base with its adapter without weights and count. A preset needs no files and no network. "
    text += "With --world_size: estimate memory of a GPU under ZeRO (docs/scaling.md)."
    arguments = make_parser("lvlm-clorae cost", text).parse_args(argv)
    config = make_config(settings_of(vars(arguments)))
    from lvlm_clorae.analysis import cost
    from lvlm_clorae.analysis.zero import Setting, choose_zero, list_weights, memory
    from lvlm_clorae.training.checks import check_experts, check_quantized

    ranks: int | None = arguments.world_size
    check_experts(config)
    check_quantized(config, {})
    if ranks is None and (given := [name for name in PER_RANK if hasattr(arguments, name)]):
        raise UserError(f"--{given[0]} needs the number of ranks. Add --world_size.")
    zero = choose_zero(config, ranks, arguments.zero_stage, getattr(arguments, "deepspeed", None))
    try:
        model = cost.describe(config, arguments.tasks)
    except ValueError as error:  # of the adapter's configuration
        raise UserError(str(error)) from None
    sizes = cost.stored_sizes(model, config)
    found: dict[str, Any] = {part: vars(size) for part, size in sizes.items()}
    tables = [cost.render_parameters(sizes, config)]
    if ranks:
        size, bits = cost.storage(config)
        setting = Setting(ranks, zero, size, config.gradient_checkpointing)
        kept = memory(list_weights(model, size, bits), setting)
        memories = dict(zip(("gpu", "host"), kept, strict=True))
        found["scaling"] = {"ranks": ranks, "zero": vars(zero), "memory": memories}
        tables.append(cost.render_memory(kept, setting))
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        make_console().print(*tables)
    return 0


def make_parser(prog: str, description: str) -> Parser:
    """Build a parser of the settings that decide the cost of a run."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    add_settings(parser, (ModelArguments, AdapterArguments))
    tasks = ["mner", "mre", "mee"]
    parser.add_argument("--tasks", nargs="+", default=tasks, metavar="NAME", help="tasks, one LoRA expert each")
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    ranks = parser.add_argument_group("Many GPUs")
    ranks.add_argument("--world_size", type=positive, default=None, metavar="N", help="number of ranks, one per GPU")
    ranks.add_argument("--zero_stage", type=int, choices=(1, 2, 3), default=None, help="as in ds_configs/ (2)")
    ranks.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed file, instead of --zero_stage")
    for name, text in PER_RANK.items():
        ranks.add_argument(f"--{name}", metavar="N", help=text)
    return parser
