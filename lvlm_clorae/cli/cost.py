"""``lvlm-clorae cost``: count parameters, estimate memory, communication and throughput."""

import argparse
import json
from typing import Any

from lvlm_clorae.arguments import Parser
from lvlm_clorae.cli import print_tables
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import AdapterArguments, ModelArguments
from lvlm_clorae.training.config_loading import add_settings, make_config, settings_of


def main(argv: list[str]) -> int:
    """Print the cost of a base with its adapter, without weights."""
    arguments = _parser().parse_args(argv)
    settings = settings_of(vars(arguments))
    if settings.get("adapter") == "all":
        return _compare_all(settings, arguments)
    config = make_config(settings)
    from lvlm_clorae.analysis import cost, scaling

    zero = scaling.choose_zero(config, arguments.world_size, arguments.zero_stage, settings.get("deepspeed"))
    model = cost.describe(config, arguments.tasks)
    sizes = cost.stored_sizes(model, config)
    plan = scaling.make_plan(model, config, arguments.world_size, zero) if arguments.world_size else None
    if arguments.json:
        counts: dict[str, Any] = {part: vars(size) for part, size in sizes.items()}
        print(json.dumps({**counts, "scaling": scaling.to_dict(plan)} if plan else counts, indent=1))
    else:
        print_tables([cost.render_parameters(sizes, config), *(scaling.render(plan) if plan else ())])
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lvlm-clorae cost",
        description="Build a base with its adapter without weights and count. A preset needs no files and no network. "
        "With --world_size: estimate per-GPU memory, communication volume and throughput (docs/scaling.md). With "
        "--adapter all: operations and trained state of all methods and ablations (docs/cost.md).",
        argument_default=argparse.SUPPRESS,
    )
    add_settings(parser, (ModelArguments, AdapterArguments))
    tasks = ["mner", "mre", "mee"]
    parser.add_argument("--tasks", nargs="+", default=tasks, metavar="NAME", help="tasks, one LoRA expert each")
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    ranks = parser.add_argument_group("Many GPUs")
    ranks.add_argument("--world_size", type=int, default=None, metavar="N", help="number of ranks, one per GPU")
    ranks.add_argument("--zero_stage", type=int, default=None, metavar="STAGE", help="1 to 3, as in ds_configs/ (2)")
    ranks.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed file, instead of --zero_stage")
    for name, text in (
        ("per_device_train_batch_size", "samples per rank and micro-step (the recipe's)"),
        ("gradient_accumulation_steps", "micro-steps per optimizer step (1)"),
        ("beta", "weight of the auxiliary loss; 0 disables it"),
    ):
        ranks.add_argument(f"--{name}", metavar="N", help=text)
    return parser


def _compare_all(settings: dict[str, Any], arguments: argparse.Namespace) -> int:
    if arguments.world_size:
        raise UserError("--adapter all compares methods on one GPU: give --world_size with one of them.")
    config = make_config({name: value for name, value in settings.items() if name != "adapter"})
    from lvlm_clorae.analysis import cost

    found = cost.figures(cost.count_systems(config, arguments.tasks), config)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print_tables([cost.render_systems(found, config)], width=160)
    return 0
