"""``lvlm-clorae evaluate``: score a run on a split."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from lvlm_clorae.arguments import Parser, positive
from lvlm_clorae.inference.adapter_directory import adapter_directory
from lvlm_clorae.tasks import MATCHES


def main(argv: list[str]) -> int:
    """Print the scores of a run on a split. Collective under a launcher."""
    arguments = _parser().parse_args(argv)
    adapter = adapter_directory(arguments.run)

    with redirect_stdout(sys.stderr):  # DeepSpeed prints when it is imported
        from lvlm_clorae.analysis.evaluate import evaluate_run, find_samples, make_folder
        from lvlm_clorae.training import distributed
        from lvlm_clorae.training.reporting import Reporter

    samples = find_samples(adapter, arguments.split, arguments.shards, arguments.datasets)
    samples.dataset.limit = arguments.limit
    if arguments.predictions:
        make_folder(arguments.predictions, arguments.split)
    with redirect_stdout(sys.stderr):  # and when it is initialized
        distributed.start()
    first = distributed.rank() == 0
    with Reporter(first and not arguments.json) as report:
        scores = evaluate_run(
            adapter,
            samples,
            batch_size=arguments.per_device_eval_batch_size,
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


def _parser() -> Parser:
    parser = Parser(
        prog="lvlm-clorae evaluate",
        description="Score a run on a split, with a table or as JSON. On several ranks: "
        "deepspeed --module lvlm_clorae evaluate ...",
    )
    add_samples(parser)
    parser.add_argument("--match", choices=MATCHES, help="criterion by which tuples match (the run's)")
    parser.add_argument(
        "--constrained",
        action=argparse.BooleanOptionalAction,
        help="constrain answers to label names, words of the text and objects (as in the run)",
    )
    parser.add_argument("--blank_images", action="store_true", help="score once more without images")
    parser.add_argument("--predictions", type=Path, metavar="DIR", help="directory for the answer to each sample")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a run and its samples."""
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run or adapter directory")
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"), help="(default: test)")
    parser.add_argument("--shards", metavar="DIR", help="directory or URL of shards (the run's)")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="restrict to these datasets")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N samples per dataset task")
    parser.add_argument("--per_device_eval_batch_size", type=positive, metavar="N", help="samples per rank (the run's)")
