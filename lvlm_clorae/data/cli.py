"""``lvlm-clorae shards``: the parser, and what its commands print. The rooms beside it are imported when one runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert import CONVERTERS

BUILD_EXAMPLES = """examples:
  lvlm-clorae shards build --dataset twitter17 --input twitter2017 --images twitter2017_images --output shards/real
  lvlm-clorae shards build --dataset twitter15 --input twitter2015 --boxes Twitter10000_v2.0/xml --output shards/boxes
  lvlm-clorae shards build --dataset jsonl --name aspects --input reviews --images photos --output shards/mine"""


def add_shards(commands: Any) -> None:
    """Give the parser of ``lvlm-clorae`` the command ``shards``."""
    shards = commands.add_parser("shards", help="build, verify, inspect or draw shards of data").add_subparsers(
        metavar="COMMAND", required=True
    )

    build = shards.add_parser(
        "build",
        help="convert a dataset, in its publisher's own files or yours, to shards",
        description="Convert a dataset to shards. shards/README.md lists the files that each is made of.",
        epilog=BUILD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--dataset", required=True, metavar="NAME", help=", ".join(CONVERTERS))
    build.add_argument("--name", metavar="NAME", help="what your own dataset (jsonl) is called; the folder's name")
    build.add_argument("--input", required=True, type=Path, metavar="DIR", help="the published annotation files")
    build.add_argument("--images", type=Path, metavar="DIR", help="its pictures; without, all of them are missing")
    build.add_argument("--boxes", type=Path, metavar="DIR", help="mner: Pascal VOC boxes, <picture>.xml, as GMNER's")
    build.add_argument("--output", required=True, type=Path, metavar="DIR", help="the shards and their index.json")
    build.add_argument("--limit", type=int, metavar="N", help="at most N samples a split")
    build.add_argument(
        "--max-rejected", type=float, default=0.005, metavar="X", help="share of records that may be unreadable (0.005)"
    )
    build.set_defaults(command=_build)

    verify = shards.add_parser("verify", help="read shards whole and list all that is wrong with them")
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.set_defaults(command=_verify)

    inspect = shards.add_parser("inspect", help="count what shards hold, or look at one sample")
    inspect.add_argument("directory", type=Path, metavar="DIR")
    inspect.add_argument("--dataset", metavar="NAME", help="only this one")
    inspect.add_argument("--split", metavar="SPLIT", help="only train, dev or test")
    inspect.add_argument("--json", action="store_true", help="print the counts as JSON")
    inspect.add_argument("--sample", metavar="K", help="print one sample: its key, or its number from 0")
    inspect.add_argument("--png", type=Path, metavar="OUT", help="draw that sample (0) with its boxes and spans")
    inspect.set_defaults(command=_inspect)

    demo = shards.add_parser("demo", help="draw the demo datasets")
    demo.add_argument("--output", required=True, type=Path, metavar="DIR", help="the shards and their index.json")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="another seed draws other samples (0)")
    demo.set_defaults(command=_demo)


def _build(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.convert import build

    report = build(
        arguments.dataset,
        arguments.input,
        arguments.images,
        arguments.output,
        name=arguments.name,
        boxes_dir=arguments.boxes,
        limit=arguments.limit,
        max_rejected=arguments.max_rejected,
    )
    print(report.summary())
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.verify import verify

    report = verify(arguments.directory)
    for problem in report.problems:
        print(problem)
    for split, count in report.samples.items():
        print(f"{split}: {count} samples")
    print(
        f"{report.shards} shards, {report.pictures} pictures, {report.missing_pictures} missing, {report.boxes} boxes"
    )
    print("sound" if report.ok else f"{len(report.problems)} problems")
    return 0 if report.ok else 1


def _inspect(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.inspect import find_sample, gather, render

    chosen = (arguments.dataset, arguments.split)
    if arguments.sample is not None or arguments.png is not None:
        found = find_sample(arguments.directory, "0" if arguments.sample is None else arguments.sample, *chosen)
        if arguments.png is not None:
            from lvlm_clorae.data.draw import draw_sample, write_png

            write_png(draw_sample(found), arguments.png)
        print(found.to_json())
        return 0
    statistics = gather(arguments.directory, *chosen)
    if arguments.json:
        print(json.dumps({name: of.to_dict() for name, of in statistics.items()}, indent=1))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120)  # a log has no width of its own
        console.print(render(statistics, console.width))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.demo.build import build_demo

    index = build_demo(arguments.output, arguments.seed)
    for name, entry in index.datasets.items():
        print(f"{name}: " + ", ".join(f"{entry.samples(split)} {split}" for split in entry.splits))
    return 0
