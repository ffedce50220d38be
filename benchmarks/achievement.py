"""What the achievement loss does on the demo: the worst dataset's F1 and All with it and without, paired by seed.

    python benchmarks/achievement.py --work runs/achievement                 5 seeds, three ways, hours
    python benchmarks/achievement.py --work runs/achievement --seeds 2 --epochs 1      a look

Every run is the demo's own job; `none` weighs all datasets alike, `softmax` and `sum` are the two normalisations. A run
that has ended is not done again, one that was cut off goes on, so this may be started again and again. A difference is
one way's score minus `none`'s of the same seed; its mean is to be read beside its standard error.
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
WAYS = {"none": ["--no-achievement"], "softmax": ["--normalise", "softmax"], "sum": ["--normalise", "sum"]}
REFERENCE = "none"


def train(work: Path, way: str, seed: int, threads: int, settings: list[str]) -> dict[str, Any]:
    """The scores of one run, which is done or gone on with where it has not ended. Raises RuntimeError if it fails."""
    run = work / f"{way}-{seed}"
    scores = run / "adapter" / "schema.json"  # the last thing that a run writes
    if not scores.exists():
        line = [sys.executable, REPOSITORY / "train.py", "--output", run, "--seed", seed, "--resume", "auto"]
        line += ["--deepspeed", REPOSITORY / "ds_configs/zero2.json", *WAYS[way], *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(list(map(str, line)), cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{run}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    units = {name: values["f1"] for name, values in found["units"].items()}
    print(f"{way}, seed {seed}: All {found['all']:.1f}, worst {min(units.values()):.1f}", flush=True)
    return {"way": way, "seed": seed, "all": found["all"], "worst": min(units.values()), "units": units}


def summarise(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Per way and score the mean, and for all but the reference the paired differences with their spread."""
    by_way: dict[str, dict[int, dict[str, float]]] = {way: {} for way in WAYS}
    for run in runs:
        by_way[run["way"]][run["seed"]] = {"All": run["all"], "worst dataset": run["worst"], **run["units"]}
    summary: dict[str, Any] = {}
    for way, seeds in by_way.items():
        for score in next(iter(seeds.values()), {}):
            values = [found[score] for found in seeds.values()]
            row: dict[str, Any] = {"mean": statistics.fmean(values), "values": values}
            pairs = [found[score] - by_way[REFERENCE][seed][score] for seed, found in seeds.items()]
            if way != REFERENCE:
                spread = statistics.stdev(pairs) if len(pairs) > 1 else math.nan
                row |= {"difference": statistics.fmean(pairs), "deviation": spread, "pairs": pairs}
                row["standard_error"] = spread / math.sqrt(len(pairs))
            summary.setdefault(score, {})[way] = row
    return summary


def table(summary: Mapping[str, Any]) -> str:
    others = [way for way in WAYS if way != REFERENCE]
    heads = ["score", REFERENCE, *(f"{way}: mean, difference ± standard error" for way in others)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for score, ways in summary.items():
        cells = [f"{ways[REFERENCE]['mean']:.1f}"]
        for way in others:
            row = ways[way]
            cells.append(f"{row['mean']:.1f}, {row['difference']:+.1f} ± {row['standard_error']:.1f}")
        lines.append(f"| {score} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--work", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--output", type=Path, help="JSON file; default results/achievement-<date>.json")
    options, settings = parser.parse_known_args(argv)  # the rest is train.py's, alike for every run
    options.about = {**description(torch.device("cpu")), "seeds": options.seeds, "settings": settings}
    options.output = results_file(parser, options.output, f"achievement-{options.about['date']}.json")
    options.work = options.work.resolve()
    return options, settings


def main(argv: list[str] | None = None) -> int:
    """Train what is left to train, print and write. Returns 1 where a run failed."""
    options, settings = parse(argv)
    asked = [(way, seed) for seed in range(options.seeds) for way in WAYS]
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(train, options.work, way, seed, options.threads, settings) for way, seed in asked]
    failed = [str(one.exception()) for one in waiting if one.exception()]
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
        return 1
    runs = [one.result() for one in waiting]
    summary = summarise(runs)
    write_text_atomic(
        options.output, json.dumps({"about": options.about, "summary": summary, "runs": runs}, indent=1) + "\n"
    )
    print(table(summary), f"written to {options.output}", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
