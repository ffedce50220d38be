"""Peak memory of a rank and losses for each file of ds_configs/, and the sizes of checkpoint and adapter.

    python benchmarks/ds_configs.py            a T5 of FLAN-T5-base's size with random weights, ViT-B-32, r = 128
    python benchmarks/ds_configs.py --quick    a smoke test: a tiny model
    python benchmarks/ds_configs.py --check    exit code 1 if a bar of the summary is not met

Every file trains the same few steps on demo samples with train.py, on two ranks of one thread. On a CPU the memory is
that of the whole process, including libraries.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, results_file
from quantised_base import FULL, QUICK, Size, save_checkpoint, tower_of

from lvlm_clorae.files import write_text_atomic

REPOSITORY = Path(__file__).parents[1]
OVERHEAD = 1_000_000
BARS = {"checkpoint": 16.5, "adapter": 4.1}
"""Maximum bytes per trained parameter beyond ``OVERHEAD``."""


def train(file: Path, base: Path, size: Size, run: Path, ranks: int, steps: int) -> dict[str, Any]:
    """Measure a run of some steps with a DeepSpeed file. Raises RuntimeError if it fails."""
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks, REPOSITORY / "train.py"]
    model = ["--model", base, "--vision", tower_of(base, size), "--lora_rank", size.rank, "--lora_dropout", 0]
    length = ["--max_target_length", size.answer]
    length += ["--max_steps", steps, "--logging_steps", 1, "--per_device_train_batch_size", 1]
    line = [*launcher, "--deepspeed", file, "--output_dir", run, "--shards", run.with_name("shards")]
    line += [*model, *length]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(list(map(str, line)), env=environment, capture_output=True, text=True)
    memory = re.search(r"peak memory of a rank: ([\d.]+) GiB", done.stdout)
    if done.returncode or not memory:
        raise RuntimeError(f"{file.name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    checkpoint = max((run / "checkpoints").iterdir())
    shapes = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["fingerprint"]["trained"].values()
    trained = sum(map(math.prod, shapes))
    return {
        "peak_gib": float(memory[1]),
        "losses": [record["loss"] for record in lines if record["kind"] == "train"],
        "trained": trained,
        "checkpoint": (folder_bytes(checkpoint) - OVERHEAD) / trained,
        "adapter": (folder_bytes(run / "adapter") - OVERHEAD) / trained,
    }


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(files: list[Path], size: Size, ranks: int, steps: int) -> dict[str, dict[str, Any]]:
    """Measure every file on the same samples."""
    from tests.helpers.launch import small_shards

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        save_checkpoint(base, size)
        small_shards(Path(folder) / "shards", train=4, dev=0, test=1)
        for file in files:
            found[file.stem] = train(file, base, size, Path(folder) / file.stem, ranks, steps)
            print(f"{file.stem}: {found[file.stem]['peak_gib']:.2f} GiB peak per rank", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write. Returns 1 if ``--check`` is given and a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = sorted((REPOSITORY / "ds_configs").glob("*.json"))
    parser.add_argument("--files", type=Path, nargs="+", default=shipped, help="DeepSpeed files; default all shipped")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file; default results/ds_configs-cpu-<date>.json")
    options = parser.parse_args(argv)
    about = {**description(torch.device("cpu")), "ranks": options.ranks, "steps": options.steps}
    output = results_file(parser, options.output, f"ds_configs-cpu-{about['date']}.json")
    files = measure(options.files, QUICK if options.quick else FULL, options.ranks, options.steps)
    write_text_atomic(output, json.dumps({"about": about, "files": files}, indent=1) + "\n")
    met = True
    for what, bar in BARS.items():
        worst = max(file[what] for file in files.values())
        met = met and worst <= bar
        verdict = "met" if worst <= bar else "not met"
        print(f"{what}: {worst:.2f} bytes per trained parameter beyond 1 MB, bar <= {bar}: {verdict}")
    print(f"written to {output}")
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    raise SystemExit(main())
