"""Effect of the achievement loss on the demo: All and the F1 of the worst dataset with and without it, paired by seed.

    python benchmarks/achievement.py --work runs/achievement                 5 seeds, 3 variants, hours
    python benchmarks/achievement.py --work runs/achievement --seeds 2 --num_train_epochs 1      a smoke test

`none` gives all datasets the same weight, `softmax` and `sum` are the two normalizations. Finished runs are read and
interrupted ones resumed, so the command can be repeated. Differences are to `none` with the same seed; their mean is
reported with its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, results_file

from lvlm_clorae.files import write_text_atomic

REPOSITORY = Path(__file__).parents[1]
VARIANTS = {"none": ["--loss_weighting", "none"], "softmax": ["--normalize", "softmax"], "sum": ["--normalize", "sum"]}
REFERENCE = "none"


def train(work: Path, variant: str, seed: int, threads: int, settings: list[str]) -> dict[str, Any]:
    """Train or resume a run that has not finished and return its scores. Raises RuntimeError if it fails."""
    run = work / f"{variant}-{seed}"
    scores = run / "adapter" / "schema.json"  # written last by a run
    if not scores.exists():
        line = [
            sys.executable,
            REPOSITORY / "train.py",
            "--output_dir",
            run,
            "--seed",
            seed,
            "--resume_from_checkpoint",
            "auto",
        ]
        line += ["--deepspeed", REPOSITORY / "ds_configs/zero2.json", *VARIANTS[variant], *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(list(map(str, line)), cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{run}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    dataset_tasks = {name: values["f1"] for name, values in found["dataset_tasks"].items()}
    print(f"{variant}, seed {seed}: All {found['all']:.1f}, worst {min(dataset_tasks.values()):.1f}", flush=True)
    return {
        "variant": variant,
        "seed": seed,
        "all": found["all"],
        "worst": min(dataset_tasks.values()),
        "dataset_tasks": dataset_tasks,
    }


def summarise(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean by score and variant, and the paired differences to the reference with their deviation."""
    by_variant: dict[str, dict[int, dict[str, float]]] = {variant: {} for variant in VARIANTS}
    for run in runs:
        by_variant[run["variant"]][run["seed"]] = {
            "All": run["all"],
            "worst dataset": run["worst"],
            **run["dataset_tasks"],
        }
    summary: dict[str, Any] = {}
    for variant, seeds in by_variant.items():
        for score in next(iter(seeds.values()), {}):
            values = [found[score] for found in seeds.values()]
            row: dict[str, Any] = {"mean": statistics.fmean(values), "values": values}
            pairs = [found[score] - by_variant[REFERENCE][seed][score] for seed, found in seeds.items()]
            if variant != REFERENCE:
                spread = statistics.stdev(pairs) if len(pairs) > 1 else math.nan
                row |= {"difference": statistics.fmean(pairs), "deviation": spread, "pairs": pairs}
                row["standard_error"] = spread / math.sqrt(len(pairs))
            summary.setdefault(score, {})[variant] = row
    return summary


def table(summary: Mapping[str, Any]) -> str:
    others = [variant for variant in VARIANTS if variant != REFERENCE]
    heads = ["score", REFERENCE, *(f"{variant}: mean, difference ± standard error" for variant in others)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for score, variants in summary.items():
        cells = [f"{variants[REFERENCE]['mean']:.1f}"]
        for variant in others:
            row = variants[variant]
            cells.append(f"{row['mean']:.1f}, {row['difference']:+.1f} ± {row['standard_error']:.1f}")
        lines.append(f"| {score} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--work", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--output", type=Path, help="JSON file; default results/achievement-<date>.json")
    options, settings = parser.parse_known_args(argv)  # other options are passed to train.py for every run
    options.about = {**description(torch.device("cpu")), "seeds": options.seeds, "settings": settings}
    options.output = results_file(parser, options.output, f"achievement-{options.about['date']}.json")
    options.work = options.work.resolve()
    return options, settings


def main(argv: list[str] | None = None) -> int:
    """Train unfinished runs, print and write. Returns 1 if a run failed."""
    options, settings = parse(argv)
    jobs = [(variant, seed) for seed in range(options.seeds) for variant in VARIANTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(train, options.work, variant, seed, options.threads, settings) for variant, seed in jobs]
    failed = [str(one.exception()) for one in futures if one.exception()]
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
        return 1
    runs = [one.result() for one in futures]
    summary = summarise(runs)
    write_text_atomic(
        options.output, json.dumps({"about": options.about, "summary": summary, "runs": runs}, indent=1) + "\n"
    )
    print(table(summary), f"written to {options.output}", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
