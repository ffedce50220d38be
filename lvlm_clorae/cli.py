"""The console command ``lvlm-clorae``: thin over the rooms below it, which are imported when a command needs them."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from lvlm_clorae.arguments import Parser
from lvlm_clorae.data.convert import CONVERTERS
from lvlm_clorae.errors import UserError
from lvlm_clorae.sweep.cli import add_sweep
from lvlm_clorae.tasks import MATCHES
from lvlm_clorae.training.config import FIELDS, add_settings, make_config

SCHEMA = "schema.json"  # what makes a directory an adapter directory, as in extractor.py, which is slow to import

BUILD_EXAMPLES = """examples:
  lvlm-clorae shards build --dataset twitter17 --input twitter2017 --images twitter2017_images --output shards/real
  lvlm-clorae shards build --dataset twitter15 --input twitter2015 --boxes Twitter10000_v2.0/xml --output shards/boxes
  lvlm-clorae shards build --dataset jsonl --name aspects --input reviews --images photos --output shards/mine"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line. 0: done, 1: the data is at fault, 2: the user has something to mend, 130: interrupted."""
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
    build.set_defaults(command=_shards_build)

    verify = shards.add_parser("verify", help="read shards whole and list all that is wrong with them")
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.set_defaults(command=_shards_verify)

    inspect = shards.add_parser("inspect", help="count what shards hold, or look at one sample")
    inspect.add_argument("directory", type=Path, metavar="DIR")
    inspect.add_argument("--dataset", metavar="NAME", help="only this one")
    inspect.add_argument("--split", metavar="SPLIT", help="only train, dev or test")
    inspect.add_argument("--json", action="store_true", help="print the counts as JSON")
    inspect.add_argument("--sample", metavar="K", help="print one sample: its key, or its number from 0")
    inspect.add_argument("--png", type=Path, metavar="OUT", help="draw that sample (0) with its boxes and spans")
    inspect.set_defaults(command=_shards_inspect)

    demo = shards.add_parser("demo", help="draw the demo datasets")
    demo.add_argument("--output", required=True, type=Path, metavar="DIR", help="the shards and their index.json")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="another seed draws other samples (0)")
    demo.set_defaults(command=_shards_demo)

    doctor = commands.add_parser("doctor", help="what this machine has and lacks for the job")
    doctor.set_defaults(command=_doctor)

    cost = commands.add_parser(
        "cost",
        help="how many parameters a base has, which are trained, and what that costs on many GPUs",
        description="Build a base with its adapter without weights and count. A preset needs no file and no network. "
        "With --world-size also memory of a rank, bytes of a step and the pace to expect (docs/scaling.md).",
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

    evaluate = commands.add_parser(
        "evaluate",
        help="score a run on a split",
        description="Score a run on a split, with a table and as JSON. On several ranks: "
        "deepspeed --no_local_rank --module lvlm_clorae.cli evaluate ...",
    )
    evaluate.add_argument("--run", required=True, type=Path, metavar="DIR", help="a run, or an adapter directory")
    evaluate.add_argument("--split", default="test", choices=("train", "dev", "test"), help="(test)")
    evaluate.add_argument("--shards", metavar="PLACE", help="where the samples lie; by default where the run had them")
    evaluate.add_argument("--datasets", nargs="+", metavar="NAME", help="only these")
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


def _shards_build(arguments: argparse.Namespace) -> int:
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


def _shards_verify(arguments: argparse.Namespace) -> int:
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


def _shards_inspect(arguments: argparse.Namespace) -> int:
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


def _shards_demo(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.data.demo.build import build_demo

    index = build_demo(arguments.output, arguments.seed)
    for name, entry in index.datasets.items():
        print(f"{name}: " + ", ".join(f"{entry.samples(split)} {split}" for split in entry.splits))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from lvlm_clorae.doctor import examine, lacking_for_training, render

    findings = examine()
    try:
        from rich.console import Console

        Console().print(render(findings))
    except ImportError:
        print(*findings, "rich: not installed. Remedy: pip install rich", sep="\n")
    return 2 if lacking_for_training(findings) else 0


def _cost(arguments: argparse.Namespace) -> int:
    settings = {name: value for name, value in vars(arguments).items() if name in FIELDS}
    config = make_config(settings)
    ranks = getattr(arguments, "world_size", None)

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


def _evaluate(arguments: argparse.Namespace) -> int:
    adapter = adapter_directory(arguments.run)

    from lvlm_clorae.analysis.evaluate import evaluate_run, find_samples, make_folder
    from lvlm_clorae.training import distributed
    from lvlm_clorae.training.reporting import Reporter

    samples = find_samples(adapter, arguments.split, arguments.shards, arguments.datasets)
    if arguments.predictions:
        make_folder(arguments.predictions, arguments.split)
    with redirect_stdout(sys.stderr):  # DeepSpeed prints as it starts
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


def adapter_directory(path: Path) -> Path:
    """The adapter directory of a run, or `path` itself where it is one. Raises UserError where it is neither."""
    for found in (path / "adapter", path):
        if (found / SCHEMA).is_file():
            return found
    if not path.is_dir():
        raise UserError(f"{path}: no such directory. Give a run directory (runs/...), or its adapter/ folder.")
    if (path / "best" / SCHEMA).is_file():
        raise UserError(
            f"{path}: the run has not ended, so it has no adapter/ yet. Its best so far: --run {path / 'best'}"
        )
    if (path / "config.yaml").is_file():
        raise UserError(f"{path}: the run has not ended, so it has no adapter/ yet. Go on with it by --resume auto.")
    raise UserError(f"{path}: is no run and no adapter directory (there is no {SCHEMA}). Give one that train.py wrote.")


if __name__ == "__main__":
    raise SystemExit(main())
