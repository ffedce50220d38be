"""Trains the runs of a plan one after another in forks of one process, keeps their results, and compares systems.

Used by testbed.py and real.py. A directory holds shards, runs and results; whatever is finished is not repeated, and an
interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from plan import MAIN, Plan, Result, Results, Run

from lvlm_clorae.arguments import RENAMED
from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic

REPOSITORY = Path(__file__).parents[1]
CURVE = ("train", "dev")
"""Kinds of lines in metrics.jsonl that make up the curve of a run."""


class Work:
    """The directory of shards, runs and results.

    Args:
        directory: created if it does not exist
        plan: the runs
        settings: settings of every run
    """

    keep_curves = False

    def __init__(self, directory: Path, plan: Plan, settings: dict[str, Any]) -> None:
        self.directory, self.plan, self.settings = directory.resolve(), plan, settings
        (self.directory / "results").mkdir(parents=True, exist_ok=True)

    def shards_name(self, run: Run) -> str:
        """The name of the shards of a run; runs on equal shards have equal names."""
        raise NotImplementedError

    def build(self, directory: Path, run: Run) -> None:
        """Write the shards of a run."""
        raise NotImplementedError

    def shards(self, run: Run) -> Path:
        """The shards of a run, built if they do not exist."""
        path = self.directory / "shards" / self.shards_name(run)
        if not path.exists():
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            shutil.rmtree(partial, ignore_errors=True)
            self.build(partial, run)
            partial.rename(path)
        return path

    def train(self, run: Run, shards: Path) -> int:
        """Train and test a run, or resume it. Returns the exit code."""
        from lvlm_clorae.training.main import main as job

        places = self.places(run, shards)
        line = ["--resume_from_checkpoint", "auto", "--deepspeed", "ds_configs/zero2.json"]
        return job([*flags(places), *line, *flags(self.arguments(run))])

    def places(self, run: Run, shards: Path) -> dict[str, Any]:
        """The settings that are places on this machine, which no results file has."""
        return {"shards": shards, "output_dir": self.directory / run.name}

    def results(self) -> dict[Run, Result]:
        """Results of the finished runs. Raises UserError as :meth:`read`."""
        paths = sorted((self.directory / "results").glob("*.json"))
        return dict(self.read(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths)

    def read(self, path: Path, content: Any) -> tuple[Run, Result]:
        """Read a run and its result from :meth:`record`. Raise UserError for another plan, other or old settings."""
        try:
            if old := sorted(set(content["settings"]) & set(RENAMED)):
                raise UserError(
                    f"{path}: its runs have old names of settings ({', '.join(old)}), and the mutual-information loss "
                    "was a mean over channels, which is now a sum: they cannot be continued. Leave out --known, or "
                    "choose another --work."
                )
            run, result = Run(**content["run"]), Result(**content["result"])
            seeds = (*range(self.plan.systems[run.system].seeds), *self.plan.tuning_seeds)
            planned = isinstance(run.rate, float) and run.seed in seeds
            if planned and (run.variant, run.system) in self.plan.order and content["settings"] == self.arguments(run):
                return run, result
        except (KeyError, TypeError):
            pass
        raise UserError(f"{path}: a run with other settings, for example of --quick. Choose another --work or --known.")

    def take(self, known: Path) -> None:
        """Import the results of an earlier --output. Raise UserError if the file is not one."""
        try:
            found = list(json.loads(known.read_text(encoding="utf-8"))["runs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{known}: not a results file of the testbed ({error}).") from None
        for run, result in [self.read(known, content) for content in found]:
            self.write(run, result)

    def keep(self, run: Run, seconds: float) -> Result:
        """Write the result of a finished run and remove its checkpoints. Without a test split it has no test scores."""
        directory = self.directory / run.name
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        dev = [line["f1"] for line in lines if line["kind"] == "dev"][-1:] or [{}]
        scores = directory / "scores.json"
        tested = json.loads(scores.read_text(encoding="utf-8"))["dataset_tasks"] if scores.exists() else {}
        shown = ("step", "dataset_task", "ce", "epoch", "f1")
        curve = [{name: line[name] for name in shown if name in line} for line in lines if line["kind"] in CURVE]
        test = {name: values["f1"] for name, values in tested.items()}
        shares = [line["aux_gradient_share"] for line in lines if "aux_gradient_share" in line]
        share = statistics.median(shares) if shares else None
        result = Result(dev[0], test, seconds, curve if self.keep_curves else (), share)
        self.write(run, result)
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        return result

    def write(self, run: Run, result: Result) -> None:
        """Write the result file unless it exists."""
        path = self.directory / "results" / f"{run.name}.json"
        if not path.exists():
            write_text_atomic(path, json.dumps(self.record(run, result), indent=1) + "\n")

    def record(self, run: Run, result: Result) -> dict[str, Any]:
        """The content of a result file."""
        return {"run": asdict(run), "result": asdict(result), "settings": self.arguments(run)}

    def arguments(self, run: Run) -> dict[str, Any]:
        """The settings of a run."""
        system = self.plan.systems[run.system].settings
        return {**self.settings, **system, "learning_rate": run.rate, "seed": run.seed}


def flags(settings: dict[str, Any]) -> list[str]:
    """Format settings as flags of train.py."""
    line: list[str] = []
    for name, value in settings.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def start(run: Run, work: Work, threads: int = 1) -> int:
    """Start a run in a fork of this process, which has imported everything. Returns the process id."""
    shards, log = work.shards(run), work.directory / f"{run.name}.log"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(threads)
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.chdir(REPOSITORY)
        code = work.train(run, shards)
        sys.stdout.flush()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def work_off(work: Work, jobs: int, minutes: float, threads: int = 1) -> list[str]:
    """Do the missing runs, ``jobs`` at a time, and start none after ``minutes``. Returns the names of failed runs."""
    import lvlm_clorae.training.evaluation
    import lvlm_clorae.training.export
    import lvlm_clorae.training.loop  # noqa: F401 - imported once, for all runs

    torch.set_num_threads(1)  # a pool of several threads does not survive a fork
    results, failed = work.results(), []
    running: dict[int, tuple[Run, float]] = {}
    end = time.monotonic() + 60 * minutes
    while True:
        busy = [run for run, _ in running.values()]
        left = [run for run in work.plan.missing(results) if run not in busy and run.name not in failed]
        while left and len(running) < jobs and time.monotonic() < end:
            run = left.pop(0)
            running[start(run, work, threads)] = run, time.monotonic()
        if not running:
            return failed
        pid, status = os.wait()
        run, began = running.pop(pid)
        seconds = time.monotonic() - began
        if os.waitstatus_to_exitcode(status):
            failed.append(run.name)
            print(f"{run.name}: failed, see {work.directory / run.name}.log", flush=True)
            continue
        results[run] = work.keep(run, seconds)
        split, score = ("test", results[run].test) if results[run].test else ("dev", results[run].dev)
        about = f"{run.name} {split} {sum(score.values()):.1f} in {seconds:.0f} s"
        print(f"{len(results)} done, {len(left)} planned: {about}", flush=True)


def summarise(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """Summarise the evaluation seeds by variant and system: rate, mean scores, All, and the first system's lead."""
    rows = []
    for variant, system in plan.order:
        found = [run for run in plan.evaluation(results, variant, system) if run in results]
        scores = {run.seed: results[run].test for run in found}
        if not scores:
            continue
        dataset_tasks = next(iter(scores.values()))
        row: dict[str, Any] = {
            "variant": variant,
            "system": system,
            "rate": plan.best_rate(results, variant, system),
            "all": spread([sum(by_task.values()) for by_task in scores.values()]),
            "dataset_tasks": {
                dataset_task: statistics.fmean(by_task[dataset_task] for by_task in scores.values())
                for dataset_task in dataset_tasks
            },
        }
        shares = [share for run in found if (share := results[run].gradient_share) is not None]
        if shares:
            row["gradient_share"] = statistics.fmean(shares)
        first = {run.seed: results[run].test for run in plan.evaluation(results, variant, MAIN[0]) if run in results}
        pairs = [
            sum(first[seed][dataset_task] - by_task[dataset_task] for dataset_task in dataset_tasks)
            for seed, by_task in scores.items()
            if seed in first
        ]
        if system != MAIN[0] and pairs:
            row["behind"] = spread(pairs)
        rows.append(row)
    return rows


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation of the sample and standard error of the mean."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    error = deviation / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "deviation": deviation, "error": error, "values": values}


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown, one table for each variant."""
    dataset_tasks = list(dict.fromkeys(dataset_task for row in rows for dataset_task in row["dataset_tasks"]))
    heads = ["system", "rate", "seeds", *dataset_tasks, "All ± deviation", f"{MAIN[0]} minus it ± error"]
    heads += ["gradient share"] if any("gradient_share" in row for row in rows) else []
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        lines += ["", f"**{variant}**", "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for row in rows:
            if row["variant"] == variant:
                share = [f"{row['gradient_share']:.1e}"] if "gradient_share" in row else []
                lines.append("| " + " | ".join([*cells(row, dataset_tasks), *share]) + " |")
    return "\n".join(lines[1:])


def cells(row: dict[str, Any], dataset_tasks: list[str]) -> list[str]:
    """Format a row of the table."""
    found, behind = row["dataset_tasks"], row.get("behind")
    return [
        row["system"],
        f"{row['rate']:g}",
        str(len(row["all"]["values"])),
        *(f"{found[dataset_task]:.1f}" if dataset_task in found else "" for dataset_task in dataset_tasks),
        f"{row['all']['mean']:.1f} ± {row['all']['deviation']:.1f}",
        f"{behind['mean']:+.1f} ± {behind['error']:.1f}" if behind else "",
    ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`carry_out` reads."""
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this time [minutes]")
    parser.add_argument("--report", action="store_true", help="report without training")
    parser.add_argument("--known", type=Path, help="results file of an earlier --output, whose runs are reused")
    parser.add_argument("--output", type=Path, help="results file (results/NAME-<date>.json once all runs are done)")


def carry_out(
    work: Work,
    options: argparse.Namespace,
    summarise: Callable[[Plan, Results], list[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]]], str],
    threads: int = 1,
) -> int:
    """Do the missing runs, print the table and write the results. Returns 1 if a run failed, 2 for a user error.

    Args:
        options: the flags of :func:`add_flags`; ``jobs``; ``about``, which describes machine and settings; ``output``,
            the results file, and ``part``, whether it is written before all runs are done
    """
    try:
        if options.known:
            work.take(options.known)
        failed = [] if options.report else work_off(work, options.jobs, options.minutes, threads)
        results = work.results()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows, left = summarise(work.plan, results), work.plan.missing(results)
    hours = sum(one.seconds for one in results.values()) / 3600
    print(table(rows), f"{len(results)} runs, {hours:.2f} hours of {threads} core(s)", sep="\n")
    if left:
        print(f"missing so far: {len(left)} runs; the next is {left[0].name}")
        if not options.part:
            return 1 if failed else 0
    runs = [work.record(run, result) for run, result in results.items()]
    content = {"about": options.about, "left": len(left), "hours": hours, "summary": rows, "runs": runs}
    write_text_atomic(options.output, json.dumps(content, indent=1) + "\n")
    print(f"written to {options.output}")
    return 1 if failed else 0
