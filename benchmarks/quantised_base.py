"""Quantized frozen bases: bytes, time of a training step, peak memory, loss and gradient.

    python benchmarks/quantised_base.py                  a T5 of FLAN-T5-base's size with random weights
    python benchmarks/quantised_base.py --quick          a tiny model, two rounds
    python benchmarks/quantised_base.py --check          exit code 1 if a bar of the summary is not met

The variants are fp32, bf16, LLM.int8 and nf4 (each with bf16 or fp32 for the other weights), with C-LoRAE and the
projector trained. Each runs in its own process; steps are interleaved, and ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))

from measure import description, interleaved, ratio, results_file

from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.models import Processor, load_model
from lvlm_clorae.models.parts import part_sizes
from lvlm_clorae.models.vision import VisionTower
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config_loading import make_config

DEMO = Path(__file__).parents[1] / "lvlm_clorae/models/demo"
TOWER = "tower.safetensors"
TASKS = ["mner", "mre", "mee"]
BETA = 0.01
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "load_in_8bit": True},
    "nf4": {"dtype": torch.bfloat16, "load_in_4bit": True},
    "int8, fp32": {"dtype": torch.float32, "load_in_8bit": True},
    "nf4, fp32": {"dtype": torch.float32, "load_in_4bit": True},
}
BYTES_BAR = 0.35
"""Maximum bytes of the language model in int8 relative to fp32."""


@dataclass(frozen=True)
class Size:
    """Sizes of the base and the batch."""

    t5: dict[str, int]
    vision: str
    rank: int
    samples: int
    text: int
    answer: int


FULL = Size(
    t5={"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    vision="ViT-B-32",
    rank=128,
    samples=1,
    text=64,
    answer=16,
)
QUICK = Size(
    t5={"vocab_size": 1600, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4},
    vision="ViT-S-32-alt",
    rank=12,
    samples=1,
    text=32,
    answer=8,
)


def save_checkpoint(folder: Path, size: Size) -> None:
    """Save a random T5 in the layout of the hub, with a separate output embedding as FLAN-T5's, and a tower."""
    torch.manual_seed(0)
    config = T5Config(
        **size.t5, dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0
    )
    model: Any = T5ForConditionalGeneration(config)
    # transformers starts from the input embedding, whose large logits make the softmax almost one-hot.
    head = torch.randn(config.vocab_size, config.d_model) * config.d_model**-0.5
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    Processor.from_pretrained(DEMO).tokenizer.save_pretrained(str(folder))
    tower = VisionTower(size.vision).trunk.state_dict()
    save_file({f"visual.{name}": tensor.contiguous() for name, tensor in tower.items()}, folder / TOWER)


def tower_of(folder: Path, size: Size) -> str:
    """Return ``--vision`` for the tower that :func:`save_checkpoint` has written."""
    return f"{size.vision}:{folder / TOWER}"


def random_batch(size: Size, image_size: int, device: torch.device) -> dict[str, Tensor]:
    """Build random images, texts and answers, the same in every process."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> Tensor:
        return torch.randint(1, size.t5["vocab_size"], (size.samples, count), generator=generator)

    batch = {"input_ids": tokens(size.text), "labels": tokens(size.answer)}
    batch["pixel_values"] = torch.randn(size.samples, 3, image_size, image_size, generator=generator)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def randomize(trained: dict[str, Tensor]) -> None:
    """Make all weights non-zero, so that every gradient is; sampled in fp32, so that bf16 gets the same values."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained.values():
            if parameter.dim() >= 2:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class Worker:
    """One variant of the base with its adapter, in its own process; the parent sends names of methods to call."""

    def __init__(self, variant: str, folder: Path, size: Size, device: torch.device) -> None:
        self.variant, self.folder, self.size, self.device = variant, folder, size, device

    def load(self) -> dict[str, Any]:
        """Load the base; return its stored bytes and the memory before and at the peak of loading."""
        before = memory(self.device, "VmRSS")
        reset_peak(self.device)
        torch.manual_seed(0)
        base, _ = load_model(str(self.folder), vision=tower_of(self.folder, self.size), **VARIANTS[self.variant])
        base.to(self.device)
        peak = {"before": before, "loading": memory(self.device, "VmHWM")}
        sizes = {part: size.bytes for part, size in part_sizes(base).items()}
        settings = {"model": str(self.folder), "lora_rank": self.size.rank, "lora_dropout": 0.0, "beta": BETA}
        self.model = add_adapter(base, make_config(settings), TASKS).to(self.device).train()
        self.model.set_task("mre")
        self.batch = random_batch(self.size, base.vision_tower.image_size, self.device)
        self.trained = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        randomize(self.trained)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-4)
        return {"bytes": {**sizes, "base": sum(sizes.values())}, "peak_bytes": peak}

    def first(self) -> float:
        """Return the loss before any step, and write its gradient to a file."""
        loss = self._backward()
        gradient = {name: one.grad.float().cpu() for name, one in self.trained.items() if one.grad is not None}
        torch.save(gradient, gradient_file(self.folder, self.variant))
        reset_peak(self.device)
        return loss

    def step(self) -> float:
        """Run one training step and return its loss."""
        loss = self._backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return loss

    def peak(self) -> int:
        """Return the peak memory of the steps so far, in bytes."""
        return memory(self.device, "VmHWM")

    def _backward(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(**self.batch).loss + BETA * self.model.mutual_information_loss()
        loss.backward()
        return float(loss.detach())


def memory(device: torch.device, field: str) -> int:
    """Return the memory of this process in bytes, now (``VmRSS``) or at the peak since :func:`reset_peak` (``VmHWM``).

    On a GPU it is the GPU's memory. getrusage's ru_maxrss is not used, since a process inherits it from its parent.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def reset_peak(device: torch.device) -> None:
    """Reset the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def gradient_file(folder: Path, variant: str) -> Path:
    return folder / f"gradient-{variant}.pt"


def cosine(folder: Path, variant: str, reference: str) -> float:
    """Compute the cosine between the gradients of two variants over all trained weights."""
    a, b = (torch.load(gradient_file(folder, name)) for name in (variant, reference))

    def dot(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
        return sum(float((x[name].double() * y[name].double()).sum()) for name in b)

    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


Ask = Callable[[str], Any]
"""Calls a method of a worker by its name and returns the result."""


def serve(pipe: Connection, threads: int, variant: str, *about: Any) -> None:
    """Call the methods that the parent sends, until it closes the pipe."""
    torch.set_num_threads(threads)
    worker = Worker(variant, *about)
    with suppress(EOFError):
        while True:
            pipe.send(getattr(worker, pipe.recv())())


@contextmanager
def workers(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Ask]]:
    """Start a process for each variant."""
    context = multiprocessing.get_context("forkserver")
    if options.device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a quantized base is loaded to the GPU if there is one
        # Imported once for all processes; not with a GPU, since these imports initialize it and a fork cannot use it.
        context.set_forkserver_preload(["bitsandbytes", "lvlm_clorae.models.loading", "lvlm_clorae.training.adapters"])
    with ExitStack() as opened:
        asks: dict[str, Ask] = {}
        for variant in VARIANTS:
            ours, theirs = context.Pipe()
            about = (theirs, options.threads, variant, folder, options.size, options.device)
            process = context.Process(target=serve, args=about)
            process.start()
            theirs.close()  # so that the pipe closes when the process ends
            opened.callback(process.join)
            opened.callback(ours.close)  # called before join, which waits for the process to end

            def ask(method: str, pipe: Any = ours) -> Any:
                pipe.send(method)
                return pipe.recv()

            asks[variant] = ask
        yield asks


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure each variant."""
    with workers(folder, options) as asks:
        rows = {variant: ask("load") for variant, ask in asks.items()}
        losses = {variant: [ask("first")] for variant, ask in asks.items()}
        steps = {
            variant: lambda variant=variant, ask=ask: losses[variant].append(ask("step"))
            for variant, ask in asks.items()
        }
        seconds = interleaved(steps, options.repeats, torch.device("cpu"))
        for variant, ask in asks.items():
            rows[variant]["peak_bytes"]["training"] = ask("peak")
    for variant, row in rows.items():
        first = losses["fp32"][0]
        row |= {
            "bytes_by_fp32": {part: size / rows["fp32"]["bytes"][part] for part, size in row["bytes"].items()},
            "seconds": statistics.median(seconds[variant]),
            "time_by_fp32": ratio(seconds, variant, "fp32"),
            "losses": losses[variant],
            "loss_off_fp32": abs(losses[variant][0] - first) / abs(first),
            "gradient_cosine": cosine(folder, variant, "fp32"),
        }
    return rows


def summarise(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare the results with the bars."""
    share = rows["int8"]["bytes_by_fp32"]["language model"]
    infinite = sum(not math.isfinite(loss) for row in rows.values() for loss in row["losses"])
    return {
        "bytes of the language model, int8 by fp32": {"value": share, "bar": BYTES_BAR, "met": share <= BYTES_BAR},
        "losses that are not finite": {"value": infinite, "bar": 0, "met": infinite == 0},
    }


def table(rows: dict[str, dict[str, Any]], summary: dict[str, Any]) -> str:
    mib = 2**20
    columns = ["variant", "language model", "tower", "whole base", "step", "peak before, loading, training"]
    columns += ["first loss", "relative error", "cosine of gradient"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for variant, row in rows.items():
        sizes, shares = row["bytes"], row["bytes_by_fp32"]
        cells = [variant]
        cells += [
            f"{sizes[part] / mib:.1f} MiB, {shares[part]:.3f}" for part in ("language model", "vision tower", "base")
        ]
        cells += [f"{row['seconds']:.3f} s, {row['time_by_fp32']:.2f}"]
        cells += [
            ", ".join(f"{row['peak_bytes'][when] / mib:.0f}" for when in ("before", "loading", "training")) + " MiB"
        ]
        cells += [f"{row['losses'][0]:.4f}", f"{row['loss_off_fp32']:.1e}", f"{row['gradient_cosine']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for name, entry in summary.items():
        met = "met" if entry["met"] else "not met"
        lines.append(f"{name}: {entry['value']:.3g}, bar <= {entry['bar']}: {met}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=4, help="rounds")
    parser.add_argument("--threads", type=int, help="number of torch threads in each process")
    parser.add_argument("--work", type=Path, help="directory for the temporary checkpoint [1.1 GiB]")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    parser.add_argument("--check", action="store_true", help="exit with code 1 if a bar of the summary is not met")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/quantised_base-<device>-<date>.json)")
    options = parser.parse_args(argv)
    options.threads = options.threads or torch.get_num_threads()
    if options.quick:
        options.repeats = 2
    options.size = QUICK if options.quick else FULL
    options.about = {
        **description(options.device),
        "threads": options.threads,
        "repeats": options.repeats,
        **vars(options.size),
    }
    prefix = "quick-" if options.quick else ""
    name = f"quantised_base-{prefix}{options.device.type}-{options.about['date']}.json"
    options.output = results_file(parser, options.output, name)
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write results. Returns 1 if ``--check`` is given and a bar is not met, else 0."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        save_checkpoint(Path(folder), options.size)
        rows = measure(Path(folder), options)
    summary = summarise(rows)
    content = {"about": options.about, "summary": summary, "variants": rows}
    write_text_atomic(options.output, json.dumps(content, indent=1) + "\n")
    print(table(rows, summary))
    print(f"written to {options.output}")
    return 1 if options.check and not all(entry["met"] for entry in summary.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
