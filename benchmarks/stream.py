"""Measure the training data loader: throughput, time to resume, bytes read, memory.

    python benchmarks/stream.py               all parts, some minutes
    python benchmarks/stream.py --quick       few samples
    python benchmarks/stream.py --check       exit code 1 if a bar is not met

Throughput is compared, in interleaved rounds and with as many worker processes, with reading the same tars and decoding
and resizing the same images by the same library, and with webdataset's own plain pipeline of the same transforms.
Ratios are medians of ratios within a round. The shards are synthetic, in a temporary directory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import description, interleaved, ratio, results_file
from lvlm_clorae.data.collate import Collator
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetSpec, Index, load_index
from lvlm_clorae.data.loader import ShardDataLoader
from lvlm_clorae.data.sampler import DistributedTaskBatchSampler, SamplingPlan
from lvlm_clorae.data.storage import LocalStorage, open_storages
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.files import write_text_atomic
from lvlm_clorae.models import Processor
from lvlm_clorae.models.families.t5 import T5Processor
from lvlm_clorae.models.processor import ImageTransform
from lvlm_clorae.tasks import build_prompt, format_answer
from tests.helpers.server import serve

SPEC = DatasetSpec("bench", "mner", ("entity",), {"entity": ["person", "location"]}, {})
BASE = Path(__file__).parents[1] / "lvlm_clorae/models/demo"
BATCH_SIZE = 8
IMAGE = (500, 375)
"""Width and height in pixels, as of a tweet's."""
BARS = {
    "time by reading, decoding and resizing alone": 1 / 0.9,
    "time by webdataset's plain pipeline": 1.0,
    "first batch on resume by cold start": 2.0,
    "bytes read by bytes of the shards": 1.1,
    "memory at ten times the shards": 1.05,
    "memory at ten times the samples": 1.05,
}


def write_shards(directory: Path, samples: int, shard: int, image: tuple[int, int] | None) -> Index:
    """Write synthetic tweets of twenty words; with ``image`` each has one of that size, smooth like a photograph."""
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(500)]
    with ShardWriter(directory, SPEC, max_samples=shard) as writer:
        for number in range(samples):
            tokens = [words[k] for k in rng.integers(0, len(words), 20)]
            sample = {
                "dataset": SPEC.name, "task": SPEC.task, "text": " ".join(tokens), "tokens": tokens,
                "image": f"{number}.jpg" if image else None, "objects": [],
                "entities": [{"type": "person", "span": [0, 2], "text": " ".join(tokens[:2])}],
            }  # fmt: skip
            writer.add("train", f"{number:07d}", sample, photograph(rng, image) if image else None)
    return load_index(directory)


def photograph(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_loader(
    index: Index,
    storages: Any,
    processor: Any,
    *,
    workers: int = 0,
    global_micro_batch: int = BATCH_SIZE,
    consumed_samples: int = 0,
    **ranks: int,
) -> ShardDataLoader:
    dataset, dataset_tasks = ShardDataset(index, storages), index.dataset_tasks("train")
    plan = SamplingPlan(0, global_micro_batch)
    sampler = DistributedTaskBatchSampler(dataset, dataset_tasks, plan, batch_size=BATCH_SIZE, **ranks)
    sampler.consumed_samples = consumed_samples
    return ShardDataLoader(dataset, sampler, Collator(processor, dataset_tasks), workers)


# ---- throughput


class Bare(IterableDataset):
    """Reads tars from beginning to end, decodes and resizes images, and does nothing else."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        images = []
        for path in self.paths[worker::workers]:
            with tarfile.open(path) as tar:
                for member in tar:
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith(".jpg"):
                        images.append(self.transform(Image.open(io.BytesIO(data))))
                    if len(images) == BATCH_SIZE:
                        yield torch.stack(images)
                        images = []


def plain_pipeline(paths: list[Path], processor: Processor, workers: int) -> Any:
    """Build the pipeline of webdataset's documentation, up to the same tensors."""
    dataset_task = SPEC.labels["entity"]

    def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return processor(
            [build_prompt(sample["json"], "entity", dataset_task) for sample in samples],
            [sample["jpg"] for sample in samples],
            [[] for _ in samples],
            [format_answer(sample["json"], "entity") for sample in samples],
        )

    dataset = (
        webdataset.WebDataset([str(path) for path in paths], shardshuffle=len(paths), seed=0)
        .shuffle(100)
        .decode("pilrgb")
        .batched(BATCH_SIZE, collation_fn=collate)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def throughput(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    index = write_shards(directory, options.samples, options.samples // 8, IMAGE)
    paths = [directory / shard.name for shard in index.dataset("bench").splits["train"]]
    processor = T5Processor(Processor.from_pretrained(BASE).tokenizer, ImageTransform(224))
    transform = open_clip.image_transform(224, is_train=False, resize_mode="squash")
    workers = options.workers

    def run(loader: Callable[[], Any]) -> Callable[[], None]:
        def consume() -> None:
            batches = sum(1 for _ in loader())
            assert batches >= options.samples // BATCH_SIZE - workers

        return consume

    seconds = interleaved(
        {
            "loader": run(lambda: make_loader(index, directory, processor, workers=workers)),
            "bare": run(lambda: DataLoader(Bare(paths, transform), batch_size=None, num_workers=workers)),
            "webdataset": run(lambda: plain_pipeline(paths, processor, workers)),
        },
        options.repeats,
        torch.device("cpu"),
    )
    return {
        "samples_per_second": {
            name: options.samples / sorted(times)[len(times) // 2] for name, times in seconds.items()
        },
        "rounds": options.repeats,
        "workers": workers,
        "time by reading, decoding and resizing alone": ratio(seconds, "loader", "bare"),
        "time by webdataset's plain pipeline": ratio(seconds, "loader", "webdataset"),
    }


# ---- resuming


def resuming(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    index = write_shards(directory, options.epoch, 500, None)
    processor = Processor.from_pretrained(BASE)

    def first_batch(consumed: int) -> Callable[[], None]:
        def run() -> None:
            how = {"workers": options.workers, "consumed_samples": consumed}
            next(iter(make_loader(load_index(directory), directory, processor, **how)))

        return run

    end = index.dataset("bench").samples("train") // BATCH_SIZE * BATCH_SIZE - BATCH_SIZE
    seconds = interleaved({"cold": first_batch(0), "resume": first_batch(end)}, options.repeats, torch.device("cpu"))
    return {
        "epoch": options.epoch,
        "seconds": {name: sorted(times)[len(times) // 2] for name, times in seconds.items()},
        "first batch on resume by cold start": ratio(seconds, "resume", "cold"),
    }


# ---- bytes


class Nothing:
    """Stands in for a processor, since only reading is measured."""

    reads_images, eos_token_id = True, 0

    def prompt_tokens(self, prompt: str) -> int:
        return 1

    def encode(self, prompts: list[str], *rest: Any) -> dict[str, torch.Tensor]:
        return {"labels": torch.zeros(len(prompts), 1, dtype=torch.long)}


def reading(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the bytes that all ranks together read in an epoch, by the bytes of the shards, eight shards per rank."""
    found: dict[str, float] = {}
    for ranks in (1, 2, 4):
        folder = directory / str(ranks)
        index = write_shards(folder, options.samples // 4 * ranks, -(-options.samples // 32), (64, 48))
        shards = index.dataset("bench").splits["train"]
        assert len(shards) == 8 * ranks
        total = sum(shard.bytes for shard in shards)

        def epoch(storages: Any, ranks: int = ranks, index: Index = index) -> None:
            for rank in range(ranks):
                how = {"global_micro_batch": BATCH_SIZE * ranks, "rank": rank, "world_size": ranks}
                for _ in make_loader(index, storages, Nothing(), **how):
                    pass

        counting = CountingStorage(folder)
        epoch({"bench": counting})
        found[f"local, {ranks} ranks"] = counting.bytes / total
        with serve(folder) as server:
            index_there, storages = open_storages(server.url)
            before = server.bytes_sent
            epoch(storages, index=index_there)
            found[f"http, {ranks} ranks"] = (server.bytes_sent - before) / total
    return {**found, "bytes read by bytes of the shards": max(found.values())}


class CountingStorage(LocalStorage):
    bytes = 0

    def read_file(self, name: str, start: int, stop: int) -> bytes:
        data = super().read_file(name, start, stop)
        self.bytes += len(data)
        return data


# ---- memory


def memory(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak memory of an epoch, with ten times as many shards and with ten times as many samples."""
    few, some = options.samples, options.samples // 10
    peaks = {}
    for name, samples, shard in (("base", few, some), ("shards", few, some // 10), ("samples", 10 * few, some)):
        write_shards(directory / name, samples, shard, (64, 48))
        line = [sys.executable, __file__, "--epoch-of", str(directory / name)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
        peaks[name] = int(done.stdout.split()[-1])
    return {
        "peak_bytes": peaks,
        "samples": few,
        "memory at ten times the shards": peaks["shards"] / peaks["base"],
        "memory at ten times the samples": peaks["samples"] / peaks["base"],
    }


def epoch_of(directory: Path) -> int:
    """Read an epoch in this process, and print its peak memory."""
    for _ in make_loader(load_index(directory), directory, Processor.from_pretrained(BASE)):
        pass
    # Not getrusage's ru_maxrss, which a process inherits from its parent.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)
    return 0


PARTS = {"throughput": throughput, "resuming": resuming, "reading": reading, "memory": memory}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--epoch", type=int, default=100_000, help="samples of the epoch that is resumed near its end")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="few samples, three rounds")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is not met")
    parser.add_argument("--output", type=Path, help="JSON file; default results/stream-<date>.json")
    parser.add_argument("--epoch-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.samples, options.epoch, options.repeats = 320, 2000, 3
    options.about = {**description(torch.device("cpu")), "image": IMAGE, "batch_size": BATCH_SIZE}
    if not options.epoch_of:
        kind = "quick-" if options.quick else ""
        options.output = results_file(parser, options.output, f"stream-{kind}{options.about['date']}.json")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write. Returns 1 if a bar is not met and ``--check`` is given, else 0."""
    options = parse(argv)
    if options.epoch_of:
        return epoch_of(options.epoch_of)
    results: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            print(name, file=sys.stderr, flush=True)
            part = results[name] = PARTS[name](Path(folder) / name, options)
            summary |= {
                bar: {"median": part[bar], "bar": limit, "met": part[bar] <= limit}
                for bar, limit in BARS.items()
                if bar in part
            }
            content = {"about": options.about, "summary": summary, **results}
            write_text_atomic(
                options.output, json.dumps(content, indent=1) + "\n"
            )  # after every part, since all take minutes
    for bar, entry in summary.items():
        print(f"{bar}: {entry['median']:.3f}, to be <= {entry['bar']:.3f}: {'met' if entry['met'] else 'not met'}")
    print(f"written to {options.output}")
    return 1 if options.check and not all(entry["met"] for entry in summary.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
