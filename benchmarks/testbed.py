"""C-LoRAE against full fine-tuning, LoRA, MoSLoRA, LoRAMoE and its own ablations, where tasks conflict and where not.

    python benchmarks/testbed.py --work runs/testbed              all of it: hours, and may be stopped and started again
    python benchmarks/testbed.py --work runs/testbed --minutes 60 as much as fits
    python benchmarks/testbed.py --work runs/testbed --report     the table of what is done so far
    python benchmarks/testbed.py --work runs/testbed --report --output part.json     what is done, to be gone on with
    python benchmarks/testbed.py --work runs/other --known part.json                 on another machine
    python benchmarks/testbed.py --work runs/look --quick         a look: few steps at one rate of the main contrast
    python benchmarks/testbed.py --work runs/drawn --drawn        the MIM term from 12 tokens instead of all

Each run is the main job on the demo base and on the datasets of testbed_world.py, alone on a core; testbed_plan.py says
which runs there are. Adapters have equal trained parameters. Scores are micro F1 by generation; a difference is the
first system's All minus another's on the same seed, and its mean is to be read beside its standard error.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import testbed_world
from measure import description, results_file
from testbed_plan import DRAWN, FULL, MAIN, QUICK, Plan, Result, Results, Run

from lvlm_clorae.errors import UserError
from lvlm_clorae.files import write_text_atomic

REPOSITORY = Path(__file__).parents[1]
SETTINGS = {
    "target_modules": ["q", "v"],
    "micro_batch": 8,
    "epochs": 4,
    "evaluate_every": 2,
    "dropout": 0.05,
    "schedule": "cosine",
    "warmup": 0.05,
    "max_answer_length": 48,
    "eval_batch": 100,
    "keep_checkpoints": 1,
}
"""Of every run; the recipe of the demo base but for the paper's target modules."""


class Work:
    """The directory of the shards, the runs and their results.

    Args:
        settings: that every run has
    """

    def __init__(self, directory: Path, plan: Plan, settings: dict[str, Any]) -> None:
        self.directory, self.plan, self.settings = directory.resolve(), plan, settings
        (self.directory / "results").mkdir(parents=True, exist_ok=True)

    def shards(self, run: Run) -> Path:
        """The shards of a run, made where they are not there."""
        task = self.plan.systems[run.system].task
        path = self.directory / "shards" / f"{run.variant}-{run.seed}-{task or 'all'}"
        if not path.exists():
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            shutil.rmtree(partial, ignore_errors=True)
            testbed_world.build(partial, run.variant, run.seed, task)
            partial.rename(path)
        return path

    def results(self) -> dict[Run, Result]:
        """Of the runs that are done. Raises UserError as :meth:`read`."""
        paths = sorted((self.directory / "results").glob("*.json"))
        return dict(self.read(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths)

    def read(self, path: Path, content: Any) -> tuple[Run, Result]:
        """A run and its result, as :meth:`record` made them. Raises UserError where it is none of these runs."""
        try:
            run, result = Run(**content["run"]), Result(**content["result"])
            seeds = (*range(self.plan.systems[run.system].seeds), *self.plan.tuning_seeds)
            planned = isinstance(run.rate, float) and run.seed in seeds
            if planned and (run.variant, run.system) in self.plan.order and content["settings"] == self.arguments(run):
                return run, result
        except (KeyError, TypeError):
            pass
        raise UserError(f"{path}: is of a run under other settings, as of --quick. Give another --work or --known.")

    def take(self, known: Path) -> None:
        """Take over the results in a JSON file that this program has written. Raises UserError where it is none."""
        try:
            found = list(json.loads(known.read_text(encoding="utf-8"))["runs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{known}: holds no results of the testbed ({error}).") from None
        for run, result in [self.read(known, content) for content in found]:
            self.write(run, result)

    def keep(self, run: Run, seconds: float) -> Result:
        """The result of a run that has ended, written; its checkpoints are not needed any more."""
        directory = self.directory / run.name
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        dev = [line["f1"] for line in lines if line["kind"] == "dev"][-1]
        units = json.loads((directory / "scores.json").read_text(encoding="utf-8"))["units"]
        result = Result(dev, {name: values["f1"] for name, values in units.items()}, seconds)
        self.write(run, result)
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        return result

    def write(self, run: Run, result: Result) -> None:
        path = self.directory / "results" / f"{run.name}.json"
        if not path.exists():
            write_text_atomic(path, json.dumps(self.record(run, result), indent=1) + "\n")

    def record(self, run: Run, result: Result) -> dict[str, Any]:
        """What is written of a run."""
        return {"run": asdict(run), "result": asdict(result), "settings": self.arguments(run)}

    def arguments(self, run: Run) -> dict[str, Any]:
        """The run's settings."""
        system = self.plan.systems[run.system].settings
        return {**self.settings, **system, "learning_rate": run.rate, "seed": run.seed}


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags of train.py."""
    line: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            line.append(flag if value else "--no-" + flag[2:])
        else:
            line += [flag, *map(str, value if isinstance(value, list) else [value])]
    return line


def start(run: Run, work: Work) -> int:
    """Start the job of a run in a process forked from this one, which has imported everything; its process id."""
    shards, log = work.shards(run), work.directory / f"{run.name}.log"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # after a fork torch mends its pool at the first use, not safely in several threads
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.chdir(REPOSITORY)
        from lvlm_clorae.training.main import main as job

        places = ["--shards", str(shards), "--output", str(work.directory / run.name), "--resume", "auto"]
        code = job([*places, "--deepspeed", "ds_configs/zero2.json", *flags(work.arguments(run))])
        sys.stdout.flush()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def work_off(work: Work, jobs: int, minutes: float) -> list[str]:
    """Do the missing runs, so many at once, and start none after so many minutes. Returns the names of failed ones."""
    import lvlm_clorae.training.evaluation
    import lvlm_clorae.training.export
    import lvlm_clorae.training.loop  # noqa: F401 - imported once, for all runs

    torch.set_num_threads(1)
    results, failed = work.results(), []
    running: dict[int, tuple[Run, float]] = {}
    end = time.monotonic() + 60 * minutes
    while True:
        busy = [run for run, _ in running.values()]
        left = [run for run in work.plan.missing(results) if run not in busy and run.name not in failed]
        while left and len(running) < jobs and time.monotonic() < end:
            run = left.pop(0)
            running[start(run, work)] = run, time.monotonic()
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
        score = sum(results[run].test.values())
        print(f"{len(results)} done, {len(left)} more in sight: {run.name} {score:.1f} in {seconds:.0f} s", flush=True)


def summarise(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """A row a variant and system, of the fresh seeds: rate, means by unit, All, and how far it is behind the first."""
    rows = []
    for variant, system in plan.order:
        scores = {run.seed: results[run].test for run in plan.verdict(results, variant, system) if run in results}
        if not scores:
            continue
        units = next(iter(scores.values()))
        row: dict[str, Any] = {
            "variant": variant,
            "system": system,
            "rate": plan.best_rate(results, variant, system),
            "all": spread([sum(found.values()) for found in scores.values()]),
            "units": {unit: statistics.fmean(found[unit] for found in scores.values()) for unit in units},
        }
        first = {run.seed: results[run].test for run in plan.verdict(results, variant, MAIN[0]) if run in results}
        pairs = [
            sum(first[seed][unit] - found[unit] for unit in units) for seed, found in scores.items() if seed in first
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
    """Markdown, a table a variant."""
    units = list(dict.fromkeys(unit for row in rows for unit in row["units"]))
    heads = ["system", "rate", "seeds", *units, "All ± deviation", f"{MAIN[0]} minus it ± error"]
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        lines += ["", f"**{variant}**", "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for row in rows:
            if row["variant"] == variant:
                lines.append("| " + " | ".join(cells(row, units)) + " |")
    return "\n".join(lines[1:])


def cells(row: dict[str, Any], units: list[str]) -> list[str]:
    found, behind = row["units"], row.get("behind")
    return [
        row["system"],
        f"{row['rate']:g}",
        str(len(row["all"]["values"])),
        *(f"{found[unit]:.1f}" if unit in found else "" for unit in units),
        f"{row['all']['mean']:.1f} ± {row['all']['deviation']:.1f}",
        f"{behind['mean']:+.1f} ± {behind['error']:.1f}" if behind else "",
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of shards, runs and results")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a core each (2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--report", action="store_true", help="train nothing")
    plan = parser.add_mutually_exclusive_group()
    plan.add_argument("--quick", action="store_true", help="few steps at one rate, two seeds of the main contrast")
    plan.add_argument("--drawn", action="store_true", help="the MIM term from few tokens against that from all")
    parser.add_argument("--known", type=Path, help="JSON file of an earlier --output, whose runs are not run again")
    parser.add_argument("--output", type=Path, help="JSON file; default, once all is done, results/testbed-<date>.json")
    options = parser.parse_args(argv)
    options.about = {**description(torch.device("cpu")), "threads": 1, "settings": SETTINGS}
    options.part = options.output is not None
    kind = "quick-" if options.quick else "drawn-" if options.drawn else ""
    options.output = results_file(parser, options.output, f"testbed-{kind}{options.about['date']}.json")
    return options


def main(argv: list[str] | None = None) -> int:
    """Do what is left, print the table, write the JSON. Returns 1: a run failed, 2: a user error."""
    options = parse(argv)
    settings = {**SETTINGS, "epochs": 1, "micro_batch": 64} if options.quick else SETTINGS
    work = Work(options.work, QUICK if options.quick else DRAWN if options.drawn else FULL, settings)
    try:
        if options.known:
            work.take(options.known)
        failed = [] if options.report else work_off(work, options.jobs, options.minutes)
        results = work.results()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows, left = summarise(work.plan, results), work.plan.missing(results)
    hours = sum(one.seconds for one in results.values()) / 3600
    print(table(rows), f"{len(results)} runs, {hours:.2f} hours of a core", sep="\n")
    if left:
        print(f"left, so far as can be told: {len(left)} runs; the next is {left[0].name}")
        if not options.part:
            return 1 if failed else 0
    runs = [work.record(run, result) for run, result in results.items()]
    content = {"about": options.about, "left": len(left), "hours": hours, "summary": rows, "runs": runs}
    write_text_atomic(options.output, json.dumps(content, indent=1) + "\n")
    print(f"written to {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
