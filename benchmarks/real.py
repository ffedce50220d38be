"""Train and test on published text and images: Twitter-15, MRE-V1, M2E2, SROIE, FUNSD.

    python benchmarks/real.py --data ../shared/data --base DIR                   all runs (hours); can be stopped
    python benchmarks/real.py --data ../shared/data --base DIR --minutes 60      start no run after an hour
    python benchmarks/real.py --data ../shared/data --base DIR --report --output part.json    write the finished runs
    python benchmarks/real.py --data ../shared/data --base DIR --known part.json        continue on another machine
    python benchmarks/real.py --data ../shared/data --base DIR --quick           few samples of the main contrast

--base is the language model that recipes/real_base builds, --aligned the base with a tower that `lvlm-clorae align` has
made of it, for the runs that read images. The directory --data has the publishers' files (shards/README.md).
real_plan.py lists the runs. They compute in bf16, for CPUs that multiply it (`lscpu` says avx512_bf16 or amx_bf16).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import few_shot
import real_data
import text_floors
from measure import description, results_file
from plan import Run
from real_plan import EXAMPLES, FULL, LOOKUP, QUICK, VARIANTS
from run_plan import Work, add_flags, carry_out, summarise, table

from lvlm_clorae.files import write_text_atomic

SETTINGS = {
    "bf16": True,
    "target_modules": ["all-linear"],
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 2,
    "lora_dropout": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "max_source_length": 640,
    "max_target_length": 384,
    "per_device_eval_batch_size": 64,
    "logging_steps": 4,
    "save_steps": 50,
    "save_total_limit": 1,
}
"""Settings of every run."""
QUICK_LIMITS = {"train": 32, "dev": 8, "test": 8}


class Real(Work):
    """The runs on published data.

    Args:
        options: the flags of the command
    """

    keep_curves = True

    def __init__(self, options: argparse.Namespace, *plan: Any) -> None:
        super().__init__(options.work, *plan)
        self.options = options

    def shards_name(self, run: Run) -> str:
        tuning = "-tuning" if run.seed in self.plan.tuning_seeds else ""
        return f"{run.variant}{tuning}-{self.plan.systems[run.system].task or 'all'}"

    def build(self, directory: Path, run: Run) -> None:
        variant, task = VARIANTS[run.variant], self.plan.systems[run.system].task
        source = self.directory / ("boxes" if variant.boxes else "text")
        real_data.build_all(source, self.options.data, variant.boxes)
        for name, train in variant.train.items():
            of_splits = real_data.DOCUMENT_LIMITS if name in real_data.DOCUMENTS else real_data.LIMITS
            limits = {**of_splits, "train": train}
            if run.variant == "full":
                limits["test"] = train
            if self.options.quick:
                limits = QUICK_LIMITS
            if run.seed in self.plan.tuning_seeds:
                limits = {split: limits[split] for split in ("train", "dev")}
            real_data.write_subset(source, directory, name, limits, task)

    def places(self, run: Run, shards: Path) -> dict[str, Any]:
        images = VARIANTS[run.variant].images
        base = {"model": self.options.aligned} if images else {"model": self.options.base, "vision": "none"}
        return super().places(run, shards) | base

    def arguments(self, run: Run) -> dict[str, Any]:
        found = {**super().arguments(run), **VARIANTS[run.variant].settings}
        return found | ({"num_train_epochs": 1} if run.seed in self.plan.tuning_seeds else {})

    def train(self, run: Run, shards: Path) -> int:
        if run.system == LOOKUP:
            found = {name: {"f1": counts.f1} for name, counts in text_floors.floors(shards).items()}
        elif run.system in EXAMPLES:
            how = {"seed": run.seed, "batch_size": 32, "max_new_tokens": SETTINGS["max_target_length"]}
            number, options = EXAMPLES[run.system], {"vision": "none", "dtype": torch.bfloat16}
            found = few_shot.evaluate(self.options.base, shards, number=number, **how, **options)
        else:
            return super().train(run, shards)
        directory = self.directory / run.name
        directory.mkdir(exist_ok=True)
        write_text_atomic(directory / "metrics.jsonl", "")
        write_text_atomic(directory / "scores.json", json.dumps({"dataset_tasks": found}) + "\n")
        return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the published files")
    parser.add_argument("--base", required=True, help="directory or Hub id of the language model")
    parser.add_argument("--aligned", help="directory of the base with a tower, for the runs that read images")
    parser.add_argument("--work", type=Path, default=Path("runs/real"), help="directory of shards, runs and results")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent runs (1)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a run (2)")
    parser.add_argument("--quick", action="store_true", help="a few samples of the main contrast")
    add_flags(parser)
    options = parser.parse_args(argv)
    options.part = options.output is not None
    options.about = {**description(torch.device("cpu")), "threads": options.threads, "settings": SETTINGS}
    name = f"real-{'quick-' if options.quick else ''}{options.about['date']}.json"
    options.output = results_file(parser, options.output, name)
    return options


def main(argv: list[str] | None = None) -> int:
    """Do the missing runs, print the table and write the results. Returns 1 if a run failed, 2 for a user error."""
    options = parse(argv)
    work = Real(options, QUICK if options.quick else FULL, SETTINGS)
    return carry_out(work, options, summarise, table, options.threads)


if __name__ == "__main__":
    raise SystemExit(main())
