"""``lvlm-clorae cost``, ``evaluate``, ``routing`` and ``compare``: their parsers, and what they print.

The rooms beside it are imported when a command needs them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lvlm_clorae.adapter_directory import adapter_directory
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import MATCHES
from lvlm_clorae.training.config import FIELDS, add_settings, make_config


def add_analysis(commands: Any) -> None:
    """Give the parser of ``lvlm-clorae`` its commands on bases and runs."""
    _add_cost(commands)
    _add_evaluate(commands)
    _add_routing(commands)
    _add_compare(commands)


def _add_cost(commands: Any) -> None:
    cost = commands.add_parser(
        "cost",
        help="how many parameters a base has, which are trained, and what that costs on many GPUs",
        description="Build a base with its adapter without weights and count. A preset needs no file and no network. "
        "With --world-size also memory of a rank, bytes of a step and the pace to expect (docs/scaling.md). With "
        "--adapter all operations and trained state of all systems and ablations (docs/cost.md).",
        argument_default=argparse.SUPPRESS,
    )
    add_settings(cost, ("model", "adapter"))
    cost.add_argument("--tasks", nargs="+", default=["mner", "mre", "mee"], metavar="NAME", help="a LoRA expert each")
    cost.add_argument("--json", action="store_true", default=False, help="print the counts as JSON")
    ranks = cost.add_argument_group("on many GPUs")
    ranks.add_argument("--world-size", type=int, metavar="N", help="ranks, one a GPU")
    ranks.add_argument("--zero-stage", type=int, metavar="STAGE", help="1 to 3, otherwise as in ds_configs/ (2)")
    ranks.add_argument("--deepspeed", metavar="FILE", help="a DeepSpeed file instead")
    ranks.add_argument("--micro-batch", metavar="N", help="samples a rank and micro-step; default: the recipe's")
    ranks.add_argument("--accumulation", metavar="N", help="micro-steps an optimizer step (1)")
    ranks.add_argument("--beta", metavar="X", help="as in training; 0: no loss of the adapter's own")
    cost.set_defaults(command=_cost)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score a run on a split",
        description="Score a run on a split, with a table and as JSON. On several ranks: "
        "deepspeed --no_local_rank --module lvlm_clorae.cli evaluate ...",
    )
    _add_samples(evaluate)
    evaluate.add_argument("--match", choices=MATCHES, help="how tuples are matched; by default as in the run")
    evaluate.add_argument(
        "--constrained",
        action=argparse.BooleanOptionalAction,
        help="answers of label names, words of the text, objects and separators alone; by default as in the run",
    )
    evaluate.add_argument("--blank-images", action="store_true", help="score once more with every picture left out")
    evaluate.add_argument("--batch", type=int, metavar="N", help="samples generated for at once; by default the run's")
    evaluate.add_argument("--predictions", type=Path, metavar="DIR", help="write each sample's answer there")
    evaluate.add_argument("--json", action="store_true", help="print the scores as JSON")
    evaluate.set_defaults(command=_evaluate)


def _add_routing(commands: Any) -> None:
    routing = commands.add_parser(
        "routing",
        help="which share of the tokens a run's gate gives to the task expert",
        description="Let a run read samples with their answers and count, by dataset, layer and kind of token, which "
        "its gate gives to the task expert: a table, a heat map, and JSON (docs/routing.md).",
    )
    _add_samples(routing)
    routing.add_argument("--batch", type=int, metavar="N", help="samples read at once; by default the run's")
    routing.add_argument("--limit", type=int, metavar="N", help="only the first N samples a dataset and sub-task")
    routing.add_argument("--png", type=Path, metavar="OUT", help="the heat map; by default routing.png in DIR")
    routing.add_argument("--json", action="store_true", help="print every layer's numbers as JSON")
    routing.set_defaults(command=_routing)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="runs beside one another: a table, differences, a radar",
        description="Test F1 of runs, a row for those that differ in nothing but the seed, and how far each is from a "
        "reference (docs/reproduce.md).",
    )
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, as runs/*")
    compare.add_argument("--reference", type=Path, metavar="RUN", help="what differences are taken to; the first run")
    compare.add_argument("--units", nargs="+", metavar="NAME", help="the columns, which All sums; as twitter15/entity")
    compare.add_argument("--paper", action="store_true", help="the paper's figures below those of its systems")
    compare.add_argument("--png", type=Path, metavar="OUT", help="draw a radar, an axis a column (Figure 4)")
    form = compare.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    form.add_argument("--json", action="store_true", help="print all of it as JSON")
    compare.set_defaults(command=_compare)


def _add_samples(parser: argparse.ArgumentParser) -> None:
    """Flags for a run and the samples that it is to read."""
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="a run, or an adapter directory")
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"), help="(test)")
    parser.add_argument("--shards", metavar="PLACE", help="where the samples lie; by default where the run had them")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these")


def _cost(arguments: argparse.Namespace) -> int:
    settings = {name: value for name, value in vars(arguments).items() if name in FIELDS}
    ranks = getattr(arguments, "world_size", None)
    if settings.get("adapter") == "all":
        return _cost_of_all(settings, arguments)
    config = make_config(settings)

    gc.disable()  # a tenth of the time: the imports make a million objects, none of them garbage
    try:
        from lvlm_clorae.analysis import parameters, scaling

        zero = scaling.choose_zero(config, ranks, getattr(arguments, "zero_stage", None), settings.get("deepspeed"))
        model = parameters.describe(config, arguments.tasks)
    finally:
        gc.enable()
    sizes = parameters.part_sizes(model)
    plan = scaling.make_plan(model, config, ranks, zero) if ranks else None
    if arguments.json:
        counts: dict[str, object] = {part: vars(size) for part, size in sizes.items()}
        print(json.dumps({**counts, "scaling": scaling.to_dict(plan)} if plan else counts, indent=1))
    else:
        from rich.console import Console

        title = f"{config.model} with {config.adapter}, rank {config.rank}"
        Console().print(parameters.render(sizes, title), *(scaling.render(plan) if plan else ()))
    return 0


def _cost_of_all(settings: dict[str, object], arguments: argparse.Namespace) -> int:
    if hasattr(arguments, "world_size"):
        raise UserError("--adapter all compares systems on one GPU: give --world-size with one of them.")
    config = make_config({name: value for name, value in settings.items() if name != "adapter"})

    gc.disable()  # as in _cost
    try:
        from lvlm_clorae.analysis import comparison

        found = comparison.figures(comparison.compare(config, arguments.tasks), config)
    finally:
        gc.enable()
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(comparison.render(found, config))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    adapter = adapter_directory(arguments.run)

    with redirect_stdout(sys.stderr):  # DeepSpeed prints as it is imported
        from lvlm_clorae.analysis.evaluate import evaluate_run, find_samples, make_folder
        from lvlm_clorae.training import distributed
        from lvlm_clorae.training.reporting import Reporter

    samples = find_samples(adapter, arguments.split, arguments.shards, arguments.datasets)
    if arguments.predictions:
        make_folder(arguments.predictions, arguments.split)
    with redirect_stdout(sys.stderr):  # and as it starts
        distributed.start()
    first = distributed.rank() == 0
    with Reporter(first and not arguments.json, log_every=1) as report:
        scores = evaluate_run(
            adapter,
            samples,
            batch_size=arguments.batch,
            match=arguments.match,
            constrained=arguments.constrained,
            blank_images=arguments.blank_images,
            predictions=arguments.predictions,
            begin=report.begin,
            advance=report.advance,
        )
        report.console.print(scores.table(), scores.confusion_table())
    if first and arguments.json:
        print(json.dumps(scores.to_dict(), indent=1))
    distributed.stop()
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.analysis.compare import compare
    from lvlm_clorae.analysis.compare_tables import sheets, to_json

    chosen = {"reference": arguments.reference, "units": arguments.units, "paper": arguments.paper}
    found = compare(arguments.runs, **chosen)
    if arguments.png:
        from lvlm_clorae.analysis.radar import draw

        found.notes += draw(found, arguments.png)
    if arguments.json:
        print(to_json(found))
        return 0
    if arguments.markdown:
        print("\n".join(sheet.markdown() for sheet in sheets(found)))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)  # a log has no width of its own
        console.print(*(sheet.rich() for sheet in sheets(found)))
    for note in found.notes:
        print(note, file=sys.stderr if arguments.markdown else sys.stdout)
    return 0


def _routing(arguments: argparse.Namespace) -> int:
    adapter = adapter_directory(arguments.run)

    with redirect_stdout(sys.stderr):  # DeepSpeed prints as it is imported
        from lvlm_clorae.analysis.evaluate import find_samples
        from lvlm_clorae.analysis.routing import measure_routing
        from lvlm_clorae.analysis.routing_plot import PLOT, check_free, plot_routing
        from lvlm_clorae.training.reporting import Reporter

    if arguments.png:
        check_free(arguments.png)
    samples = find_samples(adapter, arguments.split, arguments.shards, arguments.datasets)
    with Reporter(not arguments.json, log_every=1) as report:
        routing = measure_routing(
            adapter,
            samples,
            batch_size=arguments.batch,
            limit=arguments.limit,
            begin=report.begin,
            advance=report.advance,
        )
        picture = arguments.png or arguments.run / PLOT
        plot_routing(routing, picture)
        report.console.print(routing.table())
        report.say(f"heat map: {picture}")
    if arguments.json:
        print(json.dumps(routing.to_dict(), indent=1))
    return 0
