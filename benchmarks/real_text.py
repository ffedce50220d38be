"""The main job on published text, end to end: Twitter-15, MRE-V1 and M2E2 built, trained, tested, beside two floors.

    python benchmarks/real_text.py --data ../shared/data                       from the demo base, about an hour
    python benchmarks/real_text.py --data ../shared/data --quick               a look, of a few samples
    python benchmarks/real_text.py --data ../shared/data --base DIR --epochs 5     another base

Further settings are train.py's. Below --data lie the publishers' files in twitter15/, mnre_v1/ and m2e2/
(shards/README.md), and pictures, as many as there are, in images/. All is kept in --work: what is built, trained or
scored there is not done again, and what was cut off goes on. The floors are the base as it is, without training, and
what the training annotation alone says (text_floors.py). docs/real_text.md has figures, and says what they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, results_file
from text_floors import floor

from lvlm_clorae.data.convert import build
from lvlm_clorae.data.index import INDEX_NAME, Index
from lvlm_clorae.data.shards import SPLITS, load_index, read_samples
from lvlm_clorae.data.verify import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.training.status import STATUS, read_status

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {"twitter15": "twitter15", "mre_v1": "mnre_v1", "m2e2": "m2e2"}
"""Of each dataset the folder of its files below --data."""
RUNS = {"frozen": ["--adapter", "none", "--max-answer-length", "48"], "trained": []}
"""The runs, and what sets one apart. The base has not learnt to end an answer, so that each is as long as it may be."""
SETTINGS = [
    *("--epochs", "2", "--max-length", "192", "--max-answer-length", "96"),
    *("--eval-batch", "64", "--checkpoint-every", "100"),
]
"""Those of train.py that are not the base's recipe. Prompts and answers are longer than the demo's: of a prompt of
more than 192 tokens the label list is cut, and 28 of M2E2's 309 argument answers have more than 96."""
QUICK = ["--epochs", "1", "--max-answer-length", "24"]
QUICK_LIMIT = 32
HEADINGS = ("unit", "train / dev / test", "gold", "annotation", "frozen", "P", "R", "F1", "blank", "malformed")


class Ended(Exception):
    """A run did not get to its end; it has told why. The only argument is its exit code."""


@dataclass(frozen=True)
class Work:
    """The directory in which everything is kept, so that each part of it is done once."""

    directory: Path

    @property
    def shards(self) -> Path:
        return self.directory / "shards"

    def claim(self, asked: Mapping[str, Any]) -> None:
        """Raises UserError where the directory holds what was asked for in another way."""
        path, text = self.directory / "asked.json", json.dumps(asked, indent=1) + "\n"
        if not path.exists():
            if self.directory.exists() and any(self.directory.iterdir()):
                raise UserError(f"{self.directory}: is not empty and not this benchmark's. Give another --work.")
            write_text_atomic(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path}: other data or settings began here. Ask for the same, or give another --work.")

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what passes within to the seconds of a part, on the clock and of the processors."""
        began, used = time.monotonic(), _cpu_seconds()
        try:
            yield
        finally:
            seconds = self.seconds()
            before = seconds.get(part, {"clock": 0.0, "cpu": 0.0})
            passed = {"clock": time.monotonic() - began, "cpu": _cpu_seconds() - used}
            seconds[part] = {name: round(before[name] + passed[name], 1) for name in passed}
            write_text_atomic(self.directory / "seconds.json", json.dumps(seconds) + "\n")

    def seconds(self) -> dict[str, dict[str, float]]:
        path = self.directory / "seconds.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def build_shards(work: Work, data: Path, limit: int | None) -> Index:
    """The shards of all datasets; those that are there are read whole and held against their index.

    Raises UserError for files that are missing, and for shards that are not sound.
    """
    images = data / "images"
    present = load_index(work.shards).datasets if (work.shards / INDEX_NAME).is_file() else {}
    for name, folder in FOLDERS.items():
        if name not in present:
            report = build(name, data / folder, images if images.is_dir() else None, work.shards, limit=limit)
            print(f"built {name}: {', '.join(f'{report.samples[split]} {split}' for split in SPLITS)}", flush=True)
    problems = verify(work.shards).problems
    if problems:
        raise UserError(f"{work.shards}: {problems[0]} ({len(problems)} in all). Remove it, to build anew.")
    return load_index(work.shards)


def train(work: Work, name: str, threads: int, settings: Sequence[str]) -> dict[str, Any]:
    """Test scores of each unit of a run, which is done, gone on with, or read where it has ended. Raises Ended."""
    run = work.directory / name
    if read_status(run / STATUS).get("state") != "done":
        line = [sys.executable, REPOSITORY / "train.py", "--deepspeed", REPOSITORY / "ds_configs/zero2.json", *settings]
        line += ["--shards", work.shards, "--output", run, "--resume", "auto", *RUNS[name]]
        with work.timed(name):
            code = _call(line, threads).returncode
        if code:
            raise Ended(code)
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))["units"]
    answers = {unit: _answers(run / "predictions", unit) for unit in scores}
    return {unit: {**values, **answers[unit]} for unit, values in scores.items()}


def _answers(folder: Path, unit: str) -> dict[str, int]:
    """How many answers a unit has, and how many have a piece that cannot be read."""
    dataset, subtask = unit.split("/")
    lines = (folder / f"predictions-{dataset}-test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [line for line in map(json.loads, lines) if line["subtask"] == subtask]
    return {"answers": len(answers), "malformed": sum(line["malformed"] > 0 for line in answers)}


def blank(work: Work, datasets: Sequence[str], threads: int) -> dict[str, float]:
    """F1 of the trained run with every picture left out, of the units of these datasets. Raises Ended."""
    path = work.directory / "blank.json"
    if datasets and not path.exists():
        line = [sys.executable, "-m", "lvlm_clorae.cli", "evaluate", "--run", work.directory / "trained", "--json"]
        with work.timed("blank"):
            done = _call([*line, "--blank-images", "--datasets", *datasets], threads, stdout=subprocess.PIPE)
        if done.returncode:
            raise Ended(done.returncode)
        write_text_atomic(path, done.stdout)
    units = json.loads(path.read_text(encoding="utf-8"))["units"] if datasets else {}
    return {unit: values["f1_without_pictures"] for unit, values in units.items()}


def _call(line: Sequence[object], threads: int, **how: Any) -> subprocess.CompletedProcess[str]:
    """The process to its end. A Ctrl-C, which it has had as well, leaves it the time to save."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(list(map(str, line)), cwd=REPOSITORY, env=environment, text=True, **how) as process:
        while True:
            try:
                stdout, _ = process.communicate()
                return subprocess.CompletedProcess(line, process.returncode, stdout)
            except KeyboardInterrupt:
                print("waiting for the run to save; once more ends it at once", file=sys.stderr)


def measure(work: Work, data: Path, limit: int | None, threads: int, settings: Sequence[str]) -> dict[str, Any]:
    """All parts, one after another: the datasets' pictures, and a row a unit. Raises UserError and Ended."""
    with work.timed("shards"):
        index = build_shards(work, data, limit)
    runs = {name: train(work, name, threads, settings) for name in RUNS}
    pictures, rows = {}, []
    for name in FOLDERS:
        dataset = index.dataset(name)
        learnt = [sample for _, sample, _ in read_samples(work.shards, index, name, "train")]
        test = list(read_samples(work.shards, index, name, "test"))
        named = sum(sample["image"] is not None for _, sample, _ in test)
        pictures[name] = {"named": named, "there": sum(image is not None for *_, image in test)}
        for subtask in dataset.subtasks:
            unit, samples = f"{name}/{subtask}", {split: dataset.samples(split) for split in SPLITS}
            counts = floor(learnt, (sample for _, sample, _ in test), subtask)
            shares = {"precision": counts.precision, "recall": counts.recall, "f1": counts.f1}
            row = {"unit": unit, "samples": samples, "gold": counts.gold, "annotation": shares}
            rows.append(row | {run: scores[unit] for run, scores in runs.items()})
    without = blank(work, [name for name, count in pictures.items() if count["there"]], threads)
    for row in rows:
        row["f1_blank"] = without.get(row["unit"])
    return {"pictures": pictures, "units": rows, "seconds": work.seconds()}


def table(found: Mapping[str, Any]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    for row in found["units"]:
        trained = row["trained"]
        cells = [row["unit"], " / ".join(map(str, row["samples"].values())), str(row["gold"])]
        cells += [f"{row['annotation']['f1']:.1f}", f"{row['frozen']['f1']:.1f}"]
        cells += [f"{trained[share]:.1f}" for share in ("precision", "recall", "f1")]
        cells += ["-" if row["f1_blank"] is None else f"{row['f1_blank']:.1f}"]
        cells += [f"{trained['malformed']} of {trained['answers']}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "annotation: F1 of what the training annotation alone says; frozen: of the base as it is; P, R, F1: trained;",
        "blank: its F1 with the pictures left out; malformed: its answers with a piece that cannot be read.",
        "pictures of test: " + ", ".join(f"{n} {c['there']} of {c['named']}" for n, c in found["pictures"].items()),
        "seconds: " + ", ".join(f"{n} {s['clock']:.0f} ({s['cpu']:.0f} CPU)" for n, s in found["seconds"].items()),
    ]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="directory of the published files")
    parser.add_argument("--work", type=Path, default=Path("runs/real_text"), help="directory of the shards and runs")
    parser.add_argument("--base", "--model", default="demo", help="preset, directory or hub id of the base (demo)")
    parser.add_argument("--limit", type=int, help="samples a split of each dataset; default: all")
    parser.add_argument("--quick", action="store_true", help=f"--limit {QUICK_LIMIT} and short answers, for a look")
    parser.add_argument("--threads", type=int, default=2, help="of the runs")
    parser.add_argument("--output", type=Path, help="JSON file; default results/real_text-<date>.json")
    options, given = parser.parse_known_args(argv)  # the rest is train.py's
    base = str(Path(options.base).resolve()) if Path(options.base).is_dir() else options.base
    if options.quick and options.limit is None:
        options.limit = QUICK_LIMIT
    settings = ["--model", base, *SETTINGS, *(QUICK if options.quick else ()), *given]
    asked = {"data": str(options.data.resolve()), "limit": options.limit, "settings": settings}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.asked, options.work = asked, Work(options.work.resolve())
    options.about = {**description(device), "threads": options.threads, "limit": options.limit}
    options.about |= {"base": options.base, "settings": settings[2:]}
    options.output = results_file(parser, options.output, f"real_text-{options.about['date']}.json")
    return options, settings


def main(argv: list[str] | None = None) -> int:
    """Do what is left to do, print and write. Returns a run's exit code where it did not get to its end, else 0."""
    options, settings = parse(argv)
    try:
        options.work.claim(options.asked)
        found = measure(options.work, options.data.resolve(), options.limit, options.threads, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Ended as error:
        print(f"exit code {error.args[0]}; the same command goes on from here", file=sys.stderr)
        return int(error.args[0])
    write_text_atomic(options.output, json.dumps({"about": options.about, **found}, indent=1) + "\n")
    print(table(found), f"written to {options.output}", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
