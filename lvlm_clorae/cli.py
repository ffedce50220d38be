"""The console command ``lvlm-clorae``: thin over the rooms below it, which are imported when a command needs them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lvlm_clorae.adapter_directory import adapter_directory
from lvlm_clorae.analysis.cli import add_analysis
from lvlm_clorae.arguments import Parser
from lvlm_clorae.data.cli import add_shards
from lvlm_clorae.errors import UserError
from lvlm_clorae.quiet import quiet_libraries
from lvlm_clorae.sweep.cli import add_sweep


def main(argv: list[str] | None = None) -> int:
    """Run the command line. 0: done, 1: the data is at fault, 2: the user has something to mend, 130: interrupted."""
    quiet_libraries()
    try:
        arguments = _parser().parse_args(argv)
        return int(arguments.command(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(prog="lvlm-clorae", description="Multimodal information extraction with C-LoRAE.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_shards(commands)
    doctor = commands.add_parser("doctor", help="what this machine has and lacks for the job")
    doctor.set_defaults(command=_doctor)

    add_analysis(commands)
    predict = commands.add_parser("predict", help="extract the records of a text and a picture")
    predict.add_argument("--run", required=True, type=Path, metavar="DIR", help="a run, or an adapter directory")
    predict.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="JSON lines with text, image, task, head, tail, objects; one line each",
    )
    predict.add_argument("--text", default="", metavar="TEXT", help="tokens separated by spaces")
    predict.add_argument("--image", type=Path, metavar="FILE")
    predict.add_argument("--task", default="mner", metavar="NAME", help="mner, mre, mee, or one of your own (mner)")
    predict.add_argument("--head", metavar="NAME", help="mre: the relation's first name")
    predict.add_argument("--tail", metavar="NAME", help="mre: its second")
    predict.add_argument(
        "--objects", metavar="JSON", help="mee: boxes in the picture, [[x1, y1, x2, y2], ...] in pixels"
    )
    predict.add_argument(
        "--constrained", action="store_true", help="answers of label names, words of the text and objects alone"
    )
    predict.set_defaults(command=_predict)

    add_sweep(commands)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.doctor import examine, lacking_for_training, render

    findings = examine()
    try:
        from rich.console import Console

        Console().print(render(findings))
    except ImportError:
        print(*findings, "rich: not installed. Remedy: pip install rich", sep="\n")
    return 2 if lacking_for_training(findings) else 0


def _predict(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.records import Request, check_boxes, read_requests

    path = adapter_directory(arguments.run)
    if arguments.input:
        given = list(read_requests(arguments.input, arguments.task))
    else:
        if not (arguments.text or arguments.image):
            raise UserError("There is nothing to read: give --text, --image or both; or a file of them with --input.")
        if arguments.task == "mre" and not (arguments.head and arguments.tail):
            raise UserError("mre asks for the relation of two names: give --head and --tail.")
        if arguments.image and not arguments.image.is_file():
            raise UserError(f"{arguments.image}: no such picture.")
        boxes = check_boxes(_json(arguments.objects), "--objects") if arguments.objects else []
        names = arguments.head, arguments.tail
        given = [({}, Request(arguments.text, arguments.image, arguments.task, *names, boxes))]

    from lvlm_clorae.extractor import Extractor

    extractor = Extractor.from_pretrained(path)
    requests = [request for _, request in given]
    answers = extractor.extract_all(requests, constrained=arguments.constrained)
    for (line, _), records in zip(given, answers, strict=True):
        found = [record.to_dict() for record in records]
        for item in [{**line, "records": found}] if arguments.input else found:
            print(json.dumps(item, ensure_ascii=False))
    return 0


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


if __name__ == "__main__":
    raise SystemExit(main())
