"""What every converter needs: the report that counts and collects, pictures, samples, and bounded input files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lvlm_clorae.data.shards import MAX_IMAGE_BYTES, DatasetSpec, image_extension
from lvlm_clorae.errors import UserError

MAX_INPUT_BYTES = 1 << 30
"""Bytes of the largest annotation file that is read; the published ones are below 40 MB."""

Place = dict[str, Any]
"""``{"file", "line"}``: where a record stands, and the beginning of its sample's source."""

Box = tuple[Any, ...]
"""(x1, y1, x2, y2) in pixels, unchecked."""

Converted = tuple[str, str, dict[str, Any], bytes | None]
"""(split, key, sample, picture bytes or None), in an order that depends on the input files alone."""


@dataclass(frozen=True)
class Rejection:
    """A record that could not be converted. `line` counts from 1; in a JSON file it is the number of the record."""

    file: str
    line: int
    reason: str
    record: str = field(repr=False)


@dataclass
class BuildReport:
    """What a build read and wrote. Converters fill `notes`, `rejected` and `unusable`; `build` the rest."""

    dataset: str
    limit: int | None = None
    samples: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    missing_pictures: int = 0
    unusable: list[str] = field(default_factory=list)
    """Picture files left out: empty, not JPEG, PNG or WebP, or over the shards' bound. Also counted as missing."""
    notes: Counter[str] = field(default_factory=Counter)
    """Quirks of the published files that were met and settled, with how often."""
    rejected: list[Rejection] = field(default_factory=list)
    rejected_file: Path | None = None

    def full(self, split: str) -> bool:
        """Whether the split already has `limit` samples."""
        return self.limit is not None and self.samples[split] >= self.limit

    def reject(self, place: Place, reason: str, record: Any) -> None:
        """Add a rejection of the record at `place` (a sample's source does as well)."""
        text = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False, default=repr)
        self.rejected.append(Rejection(place["file"], place["line"], reason, text))

    def attempt(
        self, make: Callable[..., dict[str, Any]], *args: Any, place: Place, record: Any
    ) -> dict[str, Any] | None:
        """``make(*args)``, or None after rejecting the record for whatever was malformed in it."""
        try:
            return make(*args)
        except KeyError as error:
            reason = f"{error} is missing"
        except (ValueError, TypeError, IndexError, AttributeError, SyntaxError) as error:
            reason = str(error)
        except (RecursionError, MemoryError) as error:  # what a Python or JSON literal nested too deeply raises
            reason = f"nested too deeply ({type(error).__name__})"
        self.reject(place, reason, record)
        return None

    def summary(self) -> str:
        """A few lines for a terminal."""
        splits = ", ".join(f"{count} {split}" for split, count in self.samples.items())
        lines = [
            f"{self.dataset}: {splits or 'no samples'}",
            f"pictures: {self.pictures} written, {self.missing_pictures} missing",
        ]
        if self.unusable:
            lines.append(f"picture files that could not be used: {len(self.unusable)} (first: {self.unusable[0]})")
        lines += [f"{note}: {count}" for note, count in sorted(self.notes.items()) if count]
        if self.rejected:
            first = self.rejected[0]
            lines.append(f"rejected: {len(self.rejected)} (first: {first.file}, line {first.line}: {first.reason})")
        if self.rejected_file:
            lines.append(f"rejected records are in {self.rejected_file}")
        return "\n".join(lines)


class Converter(Protocol):
    """What a dataset is, and how its files become samples: a module of this package, or a `JsonLines`."""

    SPEC: DatasetSpec

    def convert(self, input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]: ...


class Pictures:
    """The picture files below a folder, by file name, however the folders in it are laid out.

    Raises UserError where `root` is given and is no directory. With no root, or for a name not found, a picture is
    missing, which is normal: tweets are deleted.
    """

    def __init__(self, root: Path | None, report: BuildReport) -> None:
        if root is not None and not root.is_dir():
            raise UserError(f"{root}: no such directory of pictures. Leave --images out to build without pictures.")
        self._report = report
        self._by_name: dict[str, Path] = {}
        self._by_stem: dict[str, Path] = {}
        for folder, folders, names in os.walk(root) if root else ():
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                self._by_name.setdefault(name, path)
                self._by_stem.setdefault(path.stem, path)

    def read(self, name: str) -> bytes | None:
        """The bytes of picture `name`, else of one that differs in its extension only; None where there is none."""
        path = self._by_name.get(name) or self._by_stem.get(Path(name).stem)
        if path is None:
            return None
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_IMAGE_BYTES else b""
        if image_extension(data) is None:
            self._report.unusable.append(str(path))
            return None
        return data


def picture_name(name: str) -> str:
    """`name`, where it is a plain file name. Raises ValueError for one that could lead out of the pictures' folder."""
    if not name or name != Path(name).name or name.startswith(".") or "\\" in name:
        raise ValueError(f"the picture's name {name[:80]!r} is not a plain file name")
    return name


def make_key(number: int, name: str) -> str:
    """A sample's key: its number, which makes it unique and sorts, and what a shard's key allows of its name."""
    return f"{number:06d}_{re.sub(r'[^A-Za-z0-9]+', '-', name)[:70]}"


def make_sample(
    spec: DatasetSpec,
    tokens: list[str],
    source: Place,
    *,
    image: str | None = None,
    objects: Iterable[Mapping[str, Any]] = (),
    **annotations: Any,
) -> dict[str, Any]:
    """A sample of `spec` with all that every sample has; `annotations` is its entities, relation or events."""
    return {
        "dataset": spec.name,
        "task": spec.task,
        "text": " ".join(tokens),
        "tokens": tokens,
        "image": image,
        "objects": list(objects),
        **annotations,
        "source": source,
    }


def number_boxes(boxes: Iterable[Box]) -> dict[Box, str]:
    """O1, O2 ... for the different boxes, by coordinates: an object's number says nothing of what it is.

    Raises TypeError for boxes whose coordinates cannot be compared.
    """
    return {box: f"O{number}" for number, box in enumerate(sorted(set(boxes)), 1)}


def token_list(value: object) -> list[str]:
    """A copy of a record's tokens. Raises ValueError unless they are a list of strings."""
    if not (isinstance(value, list) and all(isinstance(token, str) for token in value)):
        raise ValueError("the tokens are not a list of strings")
    return list(value)


def mention(tokens: list[str], start: int, end: int) -> dict[str, Any]:
    """``{"text", "span"}`` of the half-open token span. Raises ValueError where it is empty or outside the tokens."""
    if not (type(start) is int and type(end) is int and 0 <= start < end <= len(tokens)):
        raise ValueError(f"the span [{start}, {end}] is empty, reversed or outside the {len(tokens)} tokens")
    return {"text": " ".join(tokens[start:end]), "span": [start, end]}


def squeeze(text: str) -> str:
    """`text` without white space: what a mention and its published spelling have in common."""
    return "".join(text.split())


def places(tokens: list[str], name: str) -> list[tuple[int, int]]:
    """Half-open spans of the token sequences that spell `name`, spaces aside."""
    name = squeeze(name)
    found = []
    for start, token in enumerate(tokens):
        spelt, end = squeeze(token), start + 1
        while spelt and name.startswith(spelt) and spelt != name and end < len(tokens):
            spelt, end = spelt + squeeze(tokens[end]), end + 1
        if name and spelt == name:
            found.append((start, end))
    return found


def checked_mention(tokens: list[str], item: Mapping[str, Any], report: BuildReport) -> dict[str, Any]:
    """The mention of a published ``{"start", "end", "text"}``, half-open; where the text disagrees, the span counts.

    Raises KeyError for a missing key and ValueError for a span that is empty or outside the tokens.
    """
    found = mention(tokens, item["start"], item["end"])
    if found["text"] != item["text"]:
        extent = "spaces only" if squeeze(found["text"]) == squeeze(item["text"]) else "more"
        report.notes[f"mentions that differ from their span in {extent}; the span is kept"] += 1
    return found


def find_inputs(input_dir: Path, files: Mapping[str, tuple[str, ...]], published: str) -> dict[str, Path]:
    """For each split the first of its file names that is in `input_dir`. Raises UserError as `find_input`."""
    return {split: find_input(input_dir, names, published) for split, names in files.items()}


def find_input(input_dir: Path, names: tuple[str, ...], published: str) -> Path:
    """The first of `names` that is a file in `input_dir`. Raises UserError that says where the file is published."""
    if not input_dir.is_dir():
        raise UserError(f"{input_dir}: no such directory. The dataset is published at {published}.")
    for name in names:
        if (input_dir / name).is_file():
            return input_dir / name
    raise UserError(f"{input_dir}: no {' or '.join(names)} in it. It is published at {published}.")


def read_bounded(path: Path) -> bytes:
    """The file's bytes. Raises UserError above `MAX_INPUT_BYTES`."""
    size = path.stat().st_size
    if size > MAX_INPUT_BYTES:
        raise UserError(f"{path}: has {size} bytes, more than the {MAX_INPUT_BYTES} allowed. Is it the right file?")
    return path.read_bytes()


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 file, split at ``\n`` (and ``\r\n``) only: tweets contain other line separators.

    Raises UserError where the file is too large or not UTF-8.
    """
    try:
        text = read_bounded(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Save or download it again.") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_json(data: bytes, where: str, kind: type) -> Any:
    """Decoded JSON of the given type (dict or list). Raises UserError for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}). Was the file cut off?") from None
    if not isinstance(value, kind):
        raise UserError(f"{where}: not in the expected form (a JSON {kind.__name__} is expected).")
    return value
