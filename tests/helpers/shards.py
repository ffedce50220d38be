"""Small samples, images and shards for the tests of lvlm_clorae.data."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from lvlm_clorae.data.index import DatasetSpec, Index, load_index
from lvlm_clorae.data.reader import read_samples
from lvlm_clorae.data.writer import ShardWriter

TYPES = ["person", "location"]
SPEC = DatasetSpec("toy", "mner", ("entity",), {"entity": TYPES}, {"entity": 78.9})


def pil_image(kind: str = "PNG", size: tuple[int, int] = (20, 10), colour: int = 0) -> bytes:
    """The bytes of a one-colour image of `size` (width, height)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 20, 30)).save(buffer, kind)
    return buffer.getvalue()


def sample(number: int = 0, *, image: str | None = None, boxes: list[list[float]] | None = None) -> dict[str, Any]:
    """A valid `toy` sample with one entity."""
    tokens = ["Anna", "Muñoz", "met", str(number)]
    return {
        "dataset": "toy",
        "task": "mner",
        "text": " ".join(tokens),
        "tokens": tokens,
        "image": image,
        "objects": [{"id": f"O{n}", "box": box, "label": ""} for n, box in enumerate(boxes or [], 1)],
        "entities": [{"type": "person", "span": [0, 2], "text": "Anna Muñoz"}],
        "source": {"file": "toy.txt", "line": number + 1},
    }


def samples(count: int, image_every: int = 2) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    """(key, sample, image or None), an image with every `image_every`-th sample."""
    for number in range(count):
        shown = number % image_every == 0
        name = f"{number}.jpg" if shown else None
        yield f"{number:06d}_toy", sample(number, image=name), pil_image(colour=number % 256) if shown else None


def write_toy(
    directory: Path,
    spec: DatasetSpec = SPEC,
    counts: tuple[tuple[str, int], ...] = (("train", 7), ("test", 2)),
    **how: Any,
) -> Index:
    """Write `samples`, the given number per split, and return their index."""
    with ShardWriter(directory, spec, **how) as writer:
        for split, count in counts:
            for key, item, image in samples(count):
                writer.add(split, key, {**item, "dataset": spec.name}, image)
    return load_index(directory)


def read_split(directory: Path, dataset: str, split: str) -> list[dict[str, Any]]:
    """The samples of one split, without keys and images."""
    return [item for _, item, _ in read_samples(directory, load_index(directory), dataset, split)]


def files(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by relative name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def break_image(directory: Path, index: Index, number: int = 4) -> str:
    """Damage the image of one sample of the toy dataset; returns its shard's name."""
    (shard,) = index.dataset("toy").splits["train"]
    path = directory / shard.name
    data = path.read_bytes()
    path.write_bytes(data.replace(pil_image(colour=number)[:60], pil_image(colour=number)[:40] + bytes(20)))
    assert path.read_bytes() != data
    return shard.name


def break_json(directory: Path, index: Index, number: int, dataset: str = "toy", split: str = "train") -> str:
    """Damage the JSON of one sample; returns its shard's name."""
    (shard,) = index.dataset(dataset).splits[split]
    data = bytearray((directory / shard.name).read_bytes())
    data[data.index(b"{", shard.offsets[number])] = ord("[")
    (directory / shard.name).write_bytes(data)
    return shard.name
