"""Small samples, pictures and shards for the tests of lvlm_clorae.data."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from lvlm_clorae.data.batches import Instance
from lvlm_clorae.data.plan import Place
from lvlm_clorae.data.shards import DatasetEntry, DatasetSpec, Index, ShardWriter, load_index, read_samples
from lvlm_clorae.data.units import Unit

TYPES = ["person", "location"]
SPEC = DatasetSpec("toy", "mner", ("entity",), {"entity": TYPES}, {"entity": 78.9})


def picture(kind: str = "PNG", size: tuple[int, int] = (20, 10), colour: int = 0) -> bytes:
    """The bytes of a one-colour picture of `size` (width, height)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 20, 30)).save(buffer, kind)
    return buffer.getvalue()


def sample(number: int = 0, *, image: str | None = None, boxes: list[list[float]] | None = None) -> dict[str, Any]:
    """A sound `toy` sample with one entity."""
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


def samples(count: int, picture_every: int = 2) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    """(key, sample, picture or None), a picture with every `picture_every`-th sample."""
    for number in range(count):
        shown = number % picture_every == 0
        name = f"{number}.jpg" if shown else None
        yield f"{number:06d}_toy", sample(number, image=name), picture(colour=number % 256) if shown else None


def write_toy(
    directory: Path,
    spec: DatasetSpec = SPEC,
    counts: tuple[tuple[str, int], ...] = (("train", 7), ("test", 2)),
    **how: Any,
) -> Index:
    """Shards of `samples`, so many a split, and their index."""
    with ShardWriter(directory, spec, **how) as writer:
        for split, count in counts:
            for key, item, image in samples(count):
                writer.add(split, key, {**item, "dataset": spec.name}, image)
    return load_index(directory)


def read_split(directory: Path, dataset: str, split: str) -> list[dict[str, Any]]:
    """The samples of one split, without keys and pictures."""
    return [item for _, item, _ in read_samples(directory, load_index(directory), dataset, split)]


def everywhere(entry: DatasetEntry, split: str) -> list[Place]:
    """The places of a split in the order written."""
    return [Place(n, k) for n, shard in enumerate(entry.splits[split]) for k in range(shard.samples)]


def at(unit: Unit, places: Iterable[Place]) -> list[Instance]:
    """The samples at ``places``, asked for one unit."""
    return [Instance(unit, place) for place in places]


def files(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by relative name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
