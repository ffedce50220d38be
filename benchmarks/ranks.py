"""Scaling from one rank to two, each on one core: training throughput under ZeRO-2.

    python benchmarks/ranks.py             a T5 of FLAN-T5-base's size with random weights and ViT-B/32
    python benchmarks/ranks.py --quick     a smoke test: a tiny model, two rounds
    python benchmarks/ranks.py --check     exit code 1 if two ranks are less than 1.8 times as fast as one

The step is the training loop's, with collectives and the same number of samples per rank. Ranks are processes of one
thread, each pinned to a core. Rounds of one and of two ranks alternate, so that drifts of the machine affect both, and
the ratio is the median over rounds. The machine should be idle otherwise: the file records its load and the CPU time
of each rank, which shows how long it waited.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, interleaved, results_file
from quantised_base import FULL, QUICK, TASKS, Size, random_batch, save_checkpoint, tower_of

from lvlm_clorae.files import write_text_atomic

DEEPSPEED_FILE = Path(__file__).parents[1] / "ds_configs/zero2.json"
BAR = 1.8
CPU = torch.device("cpu")


class Rank:
    """One rank of a group in its own process, which receives method names."""

    def __init__(self, folder: Path, size: Size, steps: int) -> None:
        self.folder, self.size, self.steps = folder, size, steps

    def load(self) -> int:
        """Create model and engine; return the number of trained parameters."""
        import deepspeed

        from lvlm_clorae.models import load_model
        from lvlm_clorae.training import distributed
        from lvlm_clorae.training.adapters import add_adapter
        from lvlm_clorae.training.config_loading import make_config
        from lvlm_clorae.training.deepspeed_config import read_deepspeed_file, resolve

        distributed.start()
        torch.manual_seed(0)
        sizes = {"lora_rank": self.size.rank, "per_device_train_batch_size": self.size.samples}
        config = make_config({"model": str(self.folder), **sizes})
        base, _ = load_model(str(self.folder), vision=tower_of(self.folder, self.size))
        model = add_adapter(base, config, TASKS).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        content = read_deepspeed_file(DEEPSPEED_FILE)
        settings = resolve(content, config, distributed.world_size(), False, str(DEEPSPEED_FILE))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=settings)
        self.run: Any = SimpleNamespace(
            config=config, model=model, engine=engine, has_tasks=True, aux_loss="mim", padding_free=False
        )
        tensors = random_batch(self.size, base.vision_tower.image_size, CPU)
        self.batch: Any = SimpleNamespace(tensors=tensors, dataset_task=SimpleNamespace(task="mre"), invalid=[])
        return sum(parameter.numel() for parameter in trained)

    def train(self) -> tuple[float, float]:
        """Run ``steps`` steps; return the last loss over all ranks and this rank's CPU seconds."""
        from lvlm_clorae.training.loop import micro_step

        before = time.process_time()
        for _ in range(self.steps):
            losses, _ = micro_step(self.run, self.batch, 1.0, 1, last=True)
        return float(losses[0]), time.process_time() - before


def serve(pipe: Connection, core: int, variables: dict[str, str], *about: Any) -> None:
    """Run a rank on one core, which executes the parent's requests until the pipe is closed."""
    os.sched_setaffinity(0, {core})
    os.environ.update(variables)  # before the import of DeepSpeed, which detects GPUs
    torch.set_num_threads(1)
    rank = Rank(*about)
    with suppress(EOFError):
        while True:
            pipe.send(getattr(rank, pipe.recv())())


Ask = Callable[[str], list[Any]]
"""Calls a method by name on all ranks of a group and returns their results."""


@contextmanager
def group(cores: list[int], *about: Any) -> Iterator[Ask]:
    """Start a rank on each of the cores."""
    context = multiprocessing.get_context("spawn")
    common = {"WORLD_SIZE": str(len(cores)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with ExitStack() as opened:
        pipes: list[Any] = []
        for rank, core in enumerate(cores):
            ours, theirs = context.Pipe()
            variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=serve, args=(theirs, core, variables, *about))
            process.start()
            theirs.close()  # so that the pipe ends with the process
            opened.callback(process.join)
            pipes.append(ours)
        for pipe in pipes:
            opened.callback(pipe.close)  # close all before waiting for the first

        def ask(method: str) -> list[Any]:
            for pipe in pipes:
                pipe.send(method)
            return [pipe.recv() for pipe in pipes]

        yield ask


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure samples per second of each group and their ratio."""
    about = (folder, options.size, options.steps)
    with group(options.cores[:1], *about) as one, group(options.cores[:2], *about) as two:
        groups = {"1": one, "2": two}
        trained = {name: ask("load")[0] for name, ask in groups.items()}
        found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in groups}
        rounds = {name: lambda name=name, ask=ask: found[name].append(ask("train")) for name, ask in groups.items()}
        seconds = interleaved(rounds, options.repeats, CPU)
    samples = options.size.samples * options.steps
    rates = {name: [int(name) * samples / one for one in taken] for name, taken in seconds.items()}
    return {
        "trained": trained["1"],
        "samples_per_second": {name: statistics.median(rate) for name, rate in rates.items()},
        "speed_up": statistics.median(two / one for one, two in zip(rates["1"], rates["2"], strict=True)),
        "rounds": rates,
        "seconds": seconds,
        "cpu_seconds": {name: [[cpu for _, cpu in ranks] for ranks in of] for name, of in found.items()},
        "losses": {name: [ranks[0][0] for ranks in of] for name, of in found.items()},
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = sorted(os.sched_getaffinity(0))
    parser.add_argument("--cores", type=int, nargs=2, default=own[:2], metavar="N", help="default: the first two")
    parser.add_argument("--samples", type=int, default=10, help="per rank and step (10)")
    parser.add_argument("--steps", type=int, default=1, help="per round (1)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds (20)")
    parser.add_argument("--work", type=Path, help="directory for the temporary checkpoint of 1.1 GiB")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds of two steps")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 below {BAR} times the speed of one rank")
    parser.add_argument("--output", type=Path, help="JSON file; default results/ranks-<date>.json")
    options = parser.parse_args(argv)
    if len(set(options.cores)) < 2 or not set(options.cores) <= set(own):
        parser.error(f"two of these cores are needed: {', '.join(map(str, own))}")
    if options.quick:
        options.repeats = options.steps = 2
    options.size = replace(QUICK if options.quick else FULL, samples=options.samples)
    options.about = {
        **description(CPU),
        "threads": 1,
        "load": os.getloadavg()[0],
        **{name: getattr(options, name) for name in ("cores", "steps", "repeats")},
        **vars(options.size),
    }
    kind = "quick-" if options.quick else ""
    options.output = results_file(parser, options.output, f"ranks-{kind}{options.about['date']}.json")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write. Returns 1 if ``--check`` is given and the bar is not met."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        save_checkpoint(Path(folder), options.size)
        found = measure(Path(folder), options)
    met = found["speed_up"] >= BAR
    summary = {"2 ranks / 1 rank, samples per second": {"value": found["speed_up"], "bar": BAR, "met": met}}
    content = {"about": options.about, "summary": summary, **found}
    write_text_atomic(options.output, json.dumps(content, indent=1) + "\n")
    for ranks, rate in found["samples_per_second"].items():
        print(f"{ranks} rank(s): {rate:.2f} samples/s")
    print(f"2 ranks / 1 rank: {found['speed_up']:.3f}, bar >= {BAR}: {'met' if met else 'not met'}")
    print(f"written to {options.output}")
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    raise SystemExit(main())
