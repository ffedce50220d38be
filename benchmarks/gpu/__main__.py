"""What adapters cost on a GPU: layers and whole models, in one command meant to end within eight minutes.

    python benchmarks/gpu                     everything, on the first GPU
    python benchmarks/gpu --minutes 4         begin nothing after four minutes
    python benchmarks/gpu --quick             a miniature, also on a CPU

Needs this repository and an environment with torch, transformers and peft; weights are random, and nothing is
downloaded. bitsandbytes is used for the 8-bit base if it is there. The result is a JSON file and the table of
docs/gpu.md. Measured are, in bf16, the adapted layers of four bases (time, kernels, bytes saved for backward; each
relative to PEFT's LoRA of as many parameters), and training steps and decoding of whole models with the base frozen,
with LoRA and with C-LoRAE, eager and compiled. What does not fit into the time or the memory is listed as skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import gpu_layers
import gpu_models
from measure import description, results_file

from lvlm_clorae.files import write_text_atomic

Section = tuple[str, Callable[[], dict[str, Any]]]


def sections(options: argparse.Namespace, device: torch.device) -> list[Section]:
    """Return name and measurement of each section, the most important first."""
    layers, models = (gpu_layers.QUICK, gpu_models.QUICK) if options.quick else (gpu_layers.SHAPES, gpu_models.MODELS)
    found: list[Section] = [
        (f"layers/{name}", partial(gpu_layers.measure, shape, device)) for name, shape in layers.items()
    ]
    for variant, (name, model), method in product(gpu_models.VARIANTS, models.items(), gpu_layers.METHODS):
        measure = partial(gpu_models.measure, model, variant, method, device)
        found.append((f"models/{name}/{variant}/{method}", measure))
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure within the time, print the tables and write the results."""
    options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.quick:
        print("error: there is no GPU. Use --quick for a miniature on a CPU.", file=sys.stderr)
        return 2
    began, results, skipped = time.monotonic(), {}, {}
    for name, measure in sections(options, device):
        if time.monotonic() - began > 60 * options.minutes:
            skipped[name] = "no time left"
            continue
        started = time.monotonic()
        try:
            results[name] = measure()
        except (torch.cuda.OutOfMemoryError, ImportError) as error:
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{name}: {skipped.get(name, 'measured')} in {time.monotonic() - started:.0f} s", flush=True)
    about = {**description(device), "minutes": (time.monotonic() - began) / 60, "memory_gib": memory(device)}
    write_text_atomic(
        options.output, json.dumps({"about": about, "results": results, "skipped": skipped}, indent=1) + "\n"
    )
    print(f"{gpu_layers.table(results)}\n\n{gpu_models.table(results)}\nwritten to {options.output}")
    return 0


def memory(device: torch.device) -> float | None:
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="begin no measurement after this time (6)")
    parser.add_argument("--quick", action="store_true", help="a miniature, also on a CPU")
    parser.add_argument("--output", type=Path, help="results file (results/gpu-<date>.json)")
    options = parser.parse_args(argv)
    kind = "gpu-quick" if options.quick else "gpu"
    date = description(torch.device("cpu"))["date"]
    options.output = results_file(parser, options.output, f"{kind}-{date}.json")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
