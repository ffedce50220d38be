"""Samples a second of two ranks with a core each, by those of one rank with one core: training steps under ZeRO-2.

    python benchmarks/ranks.py             a T5 of FLAN-T5-base's size with random weights and ViT-B/32
    python benchmarks/ranks.py --quick     a look: a tiny model, two rounds
    python benchmarks/ranks.py --check     exit code 1 where two ranks do not reach 1.8 times one rank's pace

The step is the job's own, collectives included, with as many samples a rank in both. The ranks are processes of one
thread, each pinned to its core; rounds of one step of one and of two are interleaved, so that a machine whose pace
drifts has little time to, and the ratio is the median over the rounds. The machine must have nothing else to do: the
file says how busy it was, and what each rank computed for, so that what it waited for is seen.
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
from quantised_base import FULL, QUICK, TASKS, Size, random_batch, save_checkpoint

from lvlm_clorae.files import write_text_atomic

DEEPSPEED_FILE = Path(__file__).parents[1] / "ds_configs/zero2.json"
BAR = 1.8
CPU = torch.device("cpu")


class Rank:
    """One rank of a group, in a process of its own, to which the methods' names are sent."""

    def __init__(self, folder: Path, size: Size, steps: int) -> None:
        self.folder, self.size, self.steps = folder, size, steps

    def load(self) -> int:
        """Model and engine; how many parameters are trained."""
        import deepspeed

        from lvlm_clorae.models import load_model
        from lvlm_clorae.training import distributed
        from lvlm_clorae.training.adapters import add_adapter
        from lvlm_clorae.training.config import make_config
        from lvlm_clorae.training.deepspeed_config import read_deepspeed_file, resolve

        distributed.start()
        torch.manual_seed(0)
        config = make_config({"model": str(self.folder), "rank": self.size.rank, "micro_batch": self.size.samples})
        base, _ = load_model(str(self.folder), vision=self.size.vision)
        model = add_adapter(base, config, TASKS).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        content = read_deepspeed_file(DEEPSPEED_FILE)
        settings = resolve(content, config, distributed.world_size(), False, str(DEEPSPEED_FILE))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=settings)
        self.job: Any = SimpleNamespace(config=config, model=model, engine=engine, has_tasks=True, side_loss="mim")
        tensors = random_batch(self.size, base.vision_tower.image_size, CPU)
        self.batch: Any = SimpleNamespace(tensors=tensors, unit=SimpleNamespace(task="mre"), bad=[])
        return sum(parameter.numel() for parameter in trained)

    def train(self) -> tuple[float, float]:
        """So many steps; the last loss, of all ranks, and the seconds of this rank's core."""
        from lvlm_clorae.training.loop import micro_step

        before = time.process_time()
        for _ in range(self.steps):
            losses, _ = micro_step(self.job, self.batch, 1.0, 1, last=True)
        return float(losses[0]), time.process_time() - before


def serve(pipe: Connection, core: int, variables: dict[str, str], *about: Any) -> None:
    """Be a rank on one core: do what the parent asks for until it closes the pipe."""
    os.sched_setaffinity(0, {core})
    os.environ.update(variables)  # before DeepSpeed is imported, which looks for a GPU
    torch.set_num_threads(1)
    rank = Rank(*about)
    with suppress(EOFError):
        while True:
            pipe.send(getattr(rank, pipe.recv())())


Ask = Callable[[str], list[Any]]
"""Gives the name of a method to all ranks of a group, waits for them, and returns what they returned."""


@contextmanager
def group(cores: list[int], *about: Any) -> Iterator[Ask]:
    """A rank on each of the cores."""
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
            theirs.close()  # so that the end of the process is the end of the pipe
            opened.callback(process.join)
            pipes.append(ours)
        for pipe in pipes:
            opened.callback(pipe.close)  # all of them before the first is waited for

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
    """Samples a second of each group, their ratio, and what they are made of."""
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
    parser.add_argument("--samples", type=int, default=10, help="a rank and step; default: the recipe's, 10")
    parser.add_argument("--steps", type=int, default=1, help="a round (1)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds (20)")
    parser.add_argument("--work", type=Path, help="where the temporary folder of the checkpoint, 1.1 GiB, is made")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds of two steps")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 below {BAR} times one rank's pace")
    parser.add_argument("--output", type=Path, help="JSON file; default results/ranks-<date>.json")
    options = parser.parse_args(argv)
    if len(set(options.cores)) < 2 or not set(options.cores) <= set(own):
        parser.error(f"two cores are needed, of those that this process may use: {', '.join(map(str, own))}")
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
    """Measure, print, write. Returns the exit code: 1 where ``--check`` is given and the bar is not met, else 0."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        save_checkpoint(Path(folder), options.size)
        found = measure(Path(folder), options)
    met = found["speed_up"] >= BAR
    summary = {"2 ranks by 1 rank, samples a second": {"value": found["speed_up"], "bar": BAR, "met": met}}
    content = {"about": options.about, "summary": summary, **found}
    write_text_atomic(options.output, json.dumps(content, indent=1) + "\n")
    for ranks, rate in found["samples_per_second"].items():
        print(f"{ranks} rank(s): {rate:.2f} samples/s")
    print(f"2 ranks by 1: {found['speed_up']:.3f}, to be >= {BAR}: {'met' if met else 'not met'}")
    print(f"written to {options.output}")
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    raise SystemExit(main())
