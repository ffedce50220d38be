"""``lvlm-clorae shards``: build, verify and inspect shards."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lvlm_clorae.arguments import Parser, positive
from lvlm_clorae.cli import print_tables
from lvlm_clorae.data.convert import CONVERTERS

_BUILD_EXAMPLES = """examples:
  lvlm-clorae shards build --dataset twitter17 --input twitter2017 --images twitter2017_images --output_dir shards/real
  lvlm-clorae shards build --dataset twitter15 --input twitter2015 --boxes Twitter10000/xml --output_dir shards/boxes
  lvlm-clorae shards build --dataset jsonl --name aspects --input reviews --images photos --output_dir shards/mine"""


def main(argv: list[str]) -> int:
    """Run a sub-command of ``shards``. Returns 1 if ``verify`` finds a problem."""
    arguments = parser().parse_args(argv)
    return int(arguments.command(arguments))


def parser() -> Parser:
    """Build the parser of the command."""
    shards = Parser(prog="lvlm-clorae shards", description="Build, verify or inspect shards.")
    commands = shards.add_subparsers(metavar="COMMAND", required=True)
    _add_build(commands)
    verify = commands.add_parser("verify", help="read shards completely and list all problems")
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.set_defaults(command=_verify)
    _add_inspect(commands)
    demo = commands.add_parser("demo", help="generate the demo datasets")
    demo.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="directory of the new shards")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")
    demo.set_defaults(command=_demo)
    return shards


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="convert a dataset from its published files, or your own, to shards",
        description="Convert a dataset to shards. shards/README.md lists the files of each dataset.",
        epilog=_BUILD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--dataset", required=True, metavar="NAME", help=", ".join(CONVERTERS))
    build.add_argument("--name", metavar="NAME", help="name of your own dataset (jsonl; default: the directory's)")
    build.add_argument("--input", required=True, type=Path, metavar="DIR", help="published annotation files")
    build.add_argument("--images", type=Path, metavar="DIR", help="images; without, all of them are missing")
    build.add_argument("--boxes", type=Path, metavar="DIR", help="mner: Pascal VOC boxes, <image>.xml, as in GMNER")
    build.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="directory of the new shards")
    build.add_argument("--limit", type=int, metavar="N", help="maximum number of samples per split")
    build.add_argument(
        "--max_rejected", type=float, default=0.005, metavar="X", help="fraction of invalid records (default: 0.005)"
    )
    build.set_defaults(command=_build)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="print statistics of shards, or one sample")
    inspect.add_argument("directory", type=Path, metavar="DIR")
    inspect.add_argument("--dataset", metavar="NAME", help="restrict to one dataset")
    inspect.add_argument("--split", metavar="SPLIT", help="restrict to train, dev or test")
    inspect.add_argument("--json", action="store_true", help="print the statistics as JSON")
    inspect.add_argument("--sample", metavar="K", help="print one sample: its key, or its number from 0")
    inspect.add_argument("--model", metavar="NAME", help="report what this model cannot read or say of the samples")
    inspect.add_argument("--max_source_length", type=positive, default=256, help="[tokens] (default: 256)")
    inspect.add_argument("--max_target_length", type=positive, default=128, help="[tokens] (default: 128)")
    inspect.add_argument("--png", type=Path, metavar="FILE", help="draw that sample (0) with its boxes and spans")
    inspect.set_defaults(command=_inspect)


def _build(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.convert import build

    report = build(
        arguments.dataset,
        arguments.input,
        arguments.images,
        arguments.output_dir,
        name=arguments.name,
        boxes_dir=arguments.boxes,
        limit=arguments.limit,
        max_rejected=arguments.max_rejected,
    )
    print(report.summary())
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.validation import verify

    report = verify(arguments.directory)
    print(*report.problems, sep="\n", end="\n" if report.problems else "")
    for split, count in report.samples.items():
        print(f"{split}: {count} samples")
    print(f"{report.shards} shards, {report.images} images, {report.missing_images} missing, {report.boxes} boxes")
    print("valid" if report.ok else f"{len(report.problems)} problems")
    return 0 if report.ok else 1


def _inspect(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.inspect import find_sample, gather, tables

    chosen = (arguments.dataset, arguments.split)
    if arguments.sample is not None or arguments.png is not None:
        found = find_sample(arguments.directory, "0" if arguments.sample is None else arguments.sample, *chosen)
        if arguments.png is not None:
            from lvlm_clorae.data.render import render_sample, write_png

            write_png(render_sample(found), arguments.png)
            print(f"wrote {arguments.png}", file=sys.stderr)
        print(found.to_json())
        return 0
    if arguments.model:
        return _inspect_limits(arguments)
    statistics = gather(arguments.directory, *chosen)
    if arguments.json:
        print(json.dumps({name: item.to_dict() for name, item in statistics.items()}, indent=1))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120)  # a log file has no width
        console.print(tables(statistics, console.width))
    return 0


def _inspect_limits(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.dataset import ShardDataset
    from lvlm_clorae.data.index import SPLITS, load_index
    from lvlm_clorae.data.limits import limits_table, measure_limits
    from lvlm_clorae.models.loading import load_model

    index, (_, processor) = load_index(arguments.directory), load_model(arguments.model)
    if arguments.dataset:
        index.dataset(arguments.dataset)  # an error if there is none
    tables, content = [], {}
    for split in [arguments.split] if arguments.split else SPLITS:
        tasks = [task for task in index.dataset_tasks(split).values() if arguments.dataset in (None, task.dataset)]
        lengths = arguments.max_source_length, arguments.max_target_length
        found = measure_limits(ShardDataset(index, arguments.directory, split), tasks, processor, *lengths)
        content[split] = {name: limits.to_dict() for name, limits in found.items()}
        tables += [limits_table(found, f"{arguments.model} on {split}")] if found else []
    if arguments.json:
        print(json.dumps(content, indent=1))
    else:
        print_tables(tables)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.synthetic.generator import build_demo

    index = build_demo(arguments.output_dir, arguments.seed)
    for name, entry in index.datasets.items():
        print(f"{name}: " + ", ".join(f"{entry.samples(split)} {split}" for split in entry.splits))
    return 0
