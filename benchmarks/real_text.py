"""Train and test on published text (Twitter-15, MRE-V1, M2E2), and compare with two baselines.

    python benchmarks/real_text.py --data ../shared/data                       from the demo base, about an hour
    python benchmarks/real_text.py --data ../shared/data --quick               a few samples
    python benchmarks/real_text.py --data ../shared/data --base DIR --num_train_epochs 5     another base

Further flags are those of train.py. The directory --data has the publishers' files in twitter15/, mnre_v1/ and m2e2/
(shards/README.md), and the available images in images/. Everything is kept in --work: finished parts are not repeated,
and interrupted runs are resumed. The baselines are the base without training, and lookup in the training annotation
(text_floors.py). See docs/real_text.md for figures and limitations.
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
from lvlm_clorae.data.index import INDEX_NAME, SPLITS, Index, load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.validation import verify
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.training.run_directory import STATUS, read_status

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {"twitter15": "twitter15", "mre_v1": "mnre_v1", "m2e2": "m2e2"}
"""Directory of each dataset in --data."""
RUNS = {"frozen": ["--adapter", "none", "--max_target_length", "48"], "trained": []}
"""The runs and their own flags. An untrained base does not end its answers, so each has the maximum length."""
SETTINGS = [
    *("--num_train_epochs", "2", "--max_source_length", "1024", "--max_target_length", "96"),
    *("--per_device_eval_batch_size", "64", "--save_steps", "100"),
]
"""Flags of both runs besides the base's recipe. Prompts and answers are longer than the demo's: the label list of a
prompt of more than 192 tokens is cut, and 28 of M2E2's 309 argument answers have more than 96."""
QUICK = ["--num_train_epochs", "1", "--max_target_length", "24"]
QUICK_LIMIT = 32
HEADINGS = ("dataset_task", "train / dev / test", "gold", "annotation", "frozen", "P", "R", "F1", "blank", "malformed")


class Ended(Exception):
    """A run did not finish and has printed the reason. The argument is its exit code."""


@dataclass(frozen=True)
class Work:
    """The directory in which finished parts are kept."""

    directory: Path

    @property
    def shards(self) -> Path:
        """Directory of the shards."""
        return self.directory / "shards"

    def claim(self, asked: Mapping[str, Any]) -> None:
        """Raise UserError if the directory holds a benchmark of other data or settings."""
        path, text = self.directory / "asked.json", json.dumps(asked, indent=1) + "\n"
        if not path.exists():
            if self.directory.exists() and any(self.directory.iterdir()):
                raise UserError(f"{self.directory}: has files that are not this benchmark's. Choose another --work.")
            write_text_atomic(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path}: started with other data or settings. Use the same, or choose another --work.")

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time and CPU time of the context to a part [s]."""
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
        """Wall time and CPU time of the parts [s]."""
        path = self.directory / "seconds.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def build_shards(work: Work, data: Path, limit: int | None) -> Index:
    """Build the shards of all datasets, or verify existing ones against their index.

    Raises UserError for missing files and invalid shards.
    """
    images = data / "images"
    present = load_index(work.shards).datasets if (work.shards / INDEX_NAME).is_file() else {}
    for name, folder in FOLDERS.items():
        if name not in present:
            report = build(name, data / folder, images if images.is_dir() else None, work.shards, limit=limit)
            print(f"built {name}: {', '.join(f'{report.samples[split]} {split}' for split in SPLITS)}", flush=True)
    problems = verify(work.shards).problems
    if problems:
        raise UserError(f"{work.shards}: {problems[0]} ({len(problems)} in all). Remove it to build again.")
    return load_index(work.shards)


def train(work: Work, name: str, threads: int, settings: Sequence[str]) -> dict[str, Any]:
    """Start, resume or read a run. Returns its test scores by dataset task. Raises Ended."""
    run = work.directory / name
    if read_status(run / STATUS).get("state") != "done":
        line = [sys.executable, REPOSITORY / "train.py", "--deepspeed", REPOSITORY / "ds_configs/zero2.json", *settings]
        line += ["--shards", work.shards, "--output_dir", run, "--resume_from_checkpoint", "auto", *RUNS[name]]
        with work.timed(name):
            code = _call(line, threads).returncode
        if code:
            raise Ended(code)
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))["dataset_tasks"]
    answers = {dataset_task: _answers(run / "predictions", dataset_task) for dataset_task in scores}
    return {dataset_task: {**values, **answers[dataset_task]} for dataset_task, values in scores.items()}


def _answers(folder: Path, dataset_task: str) -> dict[str, int]:
    """Count the answers of a dataset task, and those with a piece that cannot be parsed."""
    dataset, subtask = dataset_task.split("/")
    lines = (folder / f"predictions-{dataset}-test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [line for line in map(json.loads, lines) if line["subtask"] == subtask]
    return {"answers": len(answers), "malformed": sum(line["malformed"] > 0 for line in answers)}


def blank(work: Work, datasets: Sequence[str], threads: int) -> dict[str, float]:
    """F1 of the trained run without images, by dataset task of these datasets. Raises Ended."""
    path = work.directory / "blank.json"
    if datasets and not path.exists():
        line = [sys.executable, "-m", "lvlm_clorae", "evaluate", "--run", work.directory / "trained", "--json"]
        with work.timed("blank"):
            done = _call([*line, "--blank-images", "--datasets", *datasets], threads, stdout=subprocess.PIPE)
        if done.returncode:
            raise Ended(done.returncode)
        write_text_atomic(path, done.stdout)
    dataset_tasks = json.loads(path.read_text(encoding="utf-8"))["dataset_tasks"] if datasets else {}
    return {dataset_task: values["f1_without_images"] for dataset_task, values in dataset_tasks.items()}


def _call(line: Sequence[object], threads: int, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a process to its end. After Ctrl-C, which the process receives as well, wait for it to save."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(list(map(str, line)), cwd=REPOSITORY, env=environment, text=True, **how) as process:
        while True:
            try:
                stdout, _ = process.communicate()
                return subprocess.CompletedProcess(line, process.returncode, stdout)
            except KeyboardInterrupt:
                print("waiting for the run to save; press Ctrl-C again to end it now", file=sys.stderr)


def measure(work: Work, data: Path, limit: int | None, threads: int, settings: Sequence[str]) -> dict[str, Any]:
    """Do all parts in order. Returns image counts, rows by dataset task and times. Raises UserError and Ended."""
    with work.timed("shards"):
        index = build_shards(work, data, limit)
    runs = {name: train(work, name, threads, settings) for name in RUNS}
    image_files, rows = {}, []
    for name in FOLDERS:
        dataset = index.dataset(name)
        learnt = [sample for _, sample, _ in read_samples(work.shards, index, name, "train")]
        test = list(read_samples(work.shards, index, name, "test"))
        named = sum(sample["image"] is not None for _, sample, _ in test)
        image_files[name] = {"named": named, "there": sum(image is not None for *_, image in test)}
        for subtask in dataset.subtasks:
            dataset_task, samples = f"{name}/{subtask}", {split: dataset.samples(split) for split in SPLITS}
            counts = floor(learnt, (sample for _, sample, _ in test), subtask)
            shares = {"precision": counts.precision, "recall": counts.recall, "f1": counts.f1}
            row = {"dataset_task": dataset_task, "samples": samples, "gold": counts.gold, "annotation": shares}
            rows.append(row | {run: scores[dataset_task] for run, scores in runs.items()})
    without = blank(work, [name for name, count in image_files.items() if count["there"]], threads)
    for row in rows:
        row["f1_blank"] = without.get(row["dataset_task"])
    return {"image_files": image_files, "dataset_tasks": rows, "seconds": work.seconds()}


def table(found: Mapping[str, Any]) -> str:
    """Format the results as Markdown with a legend."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    for row in found["dataset_tasks"]:
        trained = row["trained"]
        cells = [row["dataset_task"], " / ".join(map(str, row["samples"].values())), str(row["gold"])]
        cells += [f"{row['annotation']['f1']:.1f}", f"{row['frozen']['f1']:.1f}"]
        cells += [f"{trained[share]:.1f}" for share in ("precision", "recall", "f1")]
        cells += ["-" if row["f1_blank"] is None else f"{row['f1_blank']:.1f}"]
        cells += [f"{trained['malformed']} of {trained['answers']}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "annotation: F1 of lookup in the training annotation; frozen: of the base without training; P, R, F1: trained;",
        "blank: its F1 without images; malformed: its answers with a piece that cannot be parsed.",
        "images of test: " + ", ".join(f"{n} {c['there']} of {c['named']}" for n, c in found["image_files"].items()),
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
    parser.add_argument("--quick", action="store_true", help=f"--limit {QUICK_LIMIT} and short answers")
    parser.add_argument("--threads", type=int, default=2, help="threads of a run (2)")
    parser.add_argument("--output", type=Path, help="JSON file; default results/real_text-<date>.json")
    options, given = parser.parse_known_args(argv)  # the rest are flags of train.py
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
    """Do the missing parts, print and write. Returns the exit code of a run that did not finish, else 0."""
    options, settings = parse(argv)
    try:
        options.work.claim(options.asked)
        found = measure(options.work, options.data.resolve(), options.limit, options.threads, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Ended as error:
        print(f"exit code {error.args[0]}; repeat the command to resume", file=sys.stderr)
        return int(error.args[0])
    write_text_atomic(options.output, json.dumps({"about": options.about, **found}, indent=1) + "\n")
    print(table(found), f"written to {options.output}", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
