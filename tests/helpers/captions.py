"""Images of one colour with captions that name it, as files for the captions converter and as shards."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from lvlm_clorae.data.convert import build

COLOURS = ("black", "red", "green", "blue", "cyan", "yellow", "white", "orange", "gray", "purple", "brown", "pink")
PER_IMAGE = 2


def write_images(directory: Path, count: int = len(COLOURS)) -> list[str]:
    """Write one image per colour and return the names of the files."""
    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for colour in COLOURS[:count]:
        buffer = io.BytesIO()
        Image.new("RGB", (20, 10), colour).save(buffer, "PNG")
        names.append(f"{colour}.png")
        (directory / names[-1]).write_bytes(buffer.getvalue())
    return names


def write_captions(directory: Path, count: int = len(COLOURS), file: str = "captions.csv", images: str = ".") -> Path:
    """Write images, to a folder of ``directory``, and ``PER_IMAGE`` captions of each in one CSV file."""
    lines = [f"{name},{text}" for name in write_images(directory / images, count) for text in _captions(name)]
    (directory / file).write_text("\n".join(["image,caption", *lines]) + "\n", encoding="utf-8")
    return directory


def caption_shards(directory: Path) -> Path:
    """Build shards of 20 training and 4 test captions, of 10 and 2 images."""
    folder = write_captions(directory / "files")
    build("captions", folder, folder, directory / "shards", name="colours")
    return directory / "shards"


def _captions(name: str) -> list[str]:
    colour = name.partition(".")[0]
    return [f"Mara leaves {colour} Tamsk", f"guards struck the {colour} harbour"][:PER_IMAGE]
