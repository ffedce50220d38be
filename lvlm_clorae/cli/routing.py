"""``lvlm-clorae routing``: measure where the gate of a run sends tokens."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from lvlm_clorae.arguments import Parser
from lvlm_clorae.cli.evaluate import add_samples
from lvlm_clorae.files import check_free
from lvlm_clorae.inference.adapter_directory import adapter_directory


def main(argv: list[str]) -> int:
    """Print and draw the share of tokens that the gate sends to the task expert."""
    arguments = _parser().parse_args(argv)
    adapter = adapter_directory(arguments.run)

    with redirect_stdout(sys.stderr):  # DeepSpeed prints when it is imported
        from lvlm_clorae.analysis.evaluate import find_samples
        from lvlm_clorae.analysis.plots import ROUTING_PLOT, plot_routing
        from lvlm_clorae.analysis.routing import measure_routing
        from lvlm_clorae.training.reporting import Reporter

    if arguments.png:
        check_free(arguments.png)
    samples = find_samples(adapter, arguments.split, arguments.shards, arguments.datasets)
    samples.dataset.limit = arguments.limit
    with Reporter(not arguments.json) as report:
        routing = measure_routing(
            adapter,
            samples,
            batch_size=arguments.per_device_eval_batch_size,
            begin=report.begin,
            advance=report.advance,
        )
        path = arguments.png or arguments.run / ROUTING_PLOT
        plot_routing(routing, path)
        report.console.print(routing.table())
        report.say(f"heat map: {path}")
    if arguments.json:
        print(json.dumps(routing.to_dict(), indent=1))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lvlm-clorae routing",
        description="Measure, by dataset, layer and type of token, the share of tokens that the gate sends to the task "
        "expert: a table, a heat map, and JSON (docs/routing.md).",
    )
    add_samples(parser)
    parser.add_argument("--png", type=Path, metavar="FILE", help="file of the heat map (routing.png in the run)")
    parser.add_argument("--json", action="store_true", help="print JSON with the numbers of each layer")
    return parser
