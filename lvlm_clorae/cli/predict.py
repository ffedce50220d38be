"""``lvlm-clorae predict``: extract records from texts and images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_clorae.arguments import Parser
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import parse_json
from lvlm_clorae.inference.adapter_directory import adapter_directory, read_schema

if TYPE_CHECKING:
    from lvlm_clorae.inference.records import Request


def main(argv: list[str]) -> int:
    """Print the records of a request, or of each line of a file, as JSON lines."""
    arguments = _parser().parse_args(argv)
    path = adapter_directory(arguments.run)
    requests = _requests(arguments, read_schema(path))

    from lvlm_clorae.inference.extractor import Extractor

    extractor = Extractor.from_pretrained(path)
    answers = extractor.extract_all([request for _, request in requests], constrained=arguments.constrained)
    for (line, _), records in zip(requests, answers, strict=True):
        found = [record.to_dict() for record in records]
        if not (found or arguments.input):
            print("no records found", file=sys.stderr)
        for item in [{**line, "records": found}] if arguments.input else found:
            print(json.dumps(item, ensure_ascii=not str(sys.stdout.encoding).lower().startswith("utf")))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="lvlm-clorae predict", description="Extract records from a text and an image.")
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run or adapter directory")
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="JSON lines: text, image, task, head, tail, boxes, layout"
    )
    parser.add_argument("--text", metavar="TEXT", help="tokens separated by spaces")
    parser.add_argument("--image", metavar="FILE", help="image file, URL or data: URI")
    parser.add_argument("--task", default="mner", metavar="NAME", help="mner, mre, mee, or your own (default: mner)")
    parser.add_argument("--head", metavar="NAME", help="mre: first name of the relation")
    parser.add_argument("--tail", metavar="NAME", help="mre: second name of the relation")
    parser.add_argument("--boxes", metavar="JSON", help="mee: boxes in the image, [[x1, y1, x2, y2], ...] [pixels]")
    parser.add_argument(
        "--constrained", action="store_true", help="constrain answers to label names, words of the text and objects"
    )
    return parser


def _requests(arguments: argparse.Namespace, schema: dict[str, Any]) -> list[tuple[dict[str, Any], Request]]:
    from lvlm_clorae.inference.records import Request, check_boxes, check_request, find_image, read_requests

    if arguments.input:
        for name in ("text", "image", "head", "tail", "boxes"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--input and --{name} exclude each other: the file has the requests.")
        found = list(read_requests(arguments.input, arguments.task, schema))
        if not found:
            raise UserError(f"{arguments.input}: has no requests. Write a JSON object on each line.")
        return found
    if not (arguments.text or arguments.image is not None):
        raise UserError("There is nothing to read: give --text, --image or both, or a file of requests with --input.")
    image = find_image(arguments.image)
    boxes = check_boxes(_json(arguments.boxes), "--boxes") if arguments.boxes else []
    request = Request(arguments.text or "", image, arguments.task, arguments.head, arguments.tail, boxes)
    check_request(request, schema)
    return [({}, request)]


def _json(text: str) -> object:
    try:
        return parse_json(text)
    except ValueError:
        return text
