"""Compare C-LoRAE with full fine-tuning, five LoRA methods, CoBa and its ablations, with and without task conflict.

    python benchmarks/testbed.py --work runs/testbed              all runs (hours); can be stopped and resumed
    python benchmarks/testbed.py --work runs/testbed --minutes 60 start no run after an hour
    python benchmarks/testbed.py --work runs/testbed --report     print the table of the finished runs
    python benchmarks/testbed.py --work runs/testbed --report --output part.json     write the finished runs
    python benchmarks/testbed.py --work runs/other --known part.json                 continue on another machine
    python benchmarks/testbed.py --work runs/look --quick         few steps at one rate of some systems

Each run trains the demo base on the synthetic datasets of testbed_world.py with one thread; testbed_plan.py lists the
runs. Adapters have equal trained parameters. A seed decides data and order of samples, which all systems share, but not
the initial weights: shapes differ with the rank. Scores are micro F1 by generation. Differences are paired by seed and
reported with the standard error of their mean.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import testbed_world
from measure import description, results_file
from plan import Run
from run_plan import Work, add_flags, carry_out, summarise, table
from testbed_plan import FULL, QUICK

QUICK_SETTINGS = {"num_train_epochs": 1, "per_device_train_batch_size": 64, "max_target_length": 16}
SETTINGS = {
    "target_modules": ["q", "v"],
    "per_device_train_batch_size": 8,
    "num_train_epochs": 4,
    "eval_every_epochs": 2,
    "lora_dropout": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "max_target_length": 48,
    "per_device_eval_batch_size": 100,
    "save_total_limit": 1,
}
"""Settings of every run: the recipe of the demo base with the paper's target modules."""


class Testbed(Work):
    """The runs of the testbed, each on the shards of its variant and seed."""

    def shards_name(self, run: Run) -> str:
        return f"{run.variant}-{run.seed}-{self.plan.systems[run.system].task or 'all'}"

    def build(self, directory: Path, run: Run) -> None:
        testbed_world.build(directory, run.variant, run.seed, self.plan.systems[run.system].task)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of shards, runs and results")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, one thread each (2)")
    parser.add_argument("--quick", action="store_true", help="few steps at one rate, two seeds of the main contrast")
    add_flags(parser)
    options = parser.parse_args(argv)
    options.about = {**description(torch.device("cpu")), "threads": 1, "settings": SETTINGS}
    options.part = options.output is not None
    name = f"testbed-{'quick-' if options.quick else ''}{options.about['date']}.json"
    options.output = results_file(parser, options.output, name)
    return options


def main(argv: list[str] | None = None) -> int:
    """Do the missing runs, print the table and write the results. Returns 1 if a run failed, 2 for a user error."""
    options = parse(argv)
    settings = {**SETTINGS, **QUICK_SETTINGS} if options.quick else SETTINGS
    work = Testbed(options.work, QUICK if options.quick else FULL, settings)
    return carry_out(work, options, summarise, table)


if __name__ == "__main__":
    raise SystemExit(main())
