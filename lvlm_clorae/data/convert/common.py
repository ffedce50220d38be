"""Shared parts of the converters: the build report, image files, sample construction and reading of input files."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lvlm_clorae import files
from lvlm_clorae.data.convert.image_files import ImageFiles
from lvlm_clorae.data.index import DatasetSpec
from lvlm_clorae.errors import UserError

MAX_INPUT_BYTES = 1 << 30
"""Bytes of the largest annotation file that is read; the published ones are smaller than 40 MB."""

LOUD_SHARE = 0.2
"""Share of missing images above which a build warns."""

_PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))

Sample = dict[str, Any]
Made = TypeVar("Made")
Files = Mapping[str, tuple[str, ...]]  # split -> the names that its annotation file can have
Origin = dict[str, Any]  # "file" and "line" of a record, the first entries of its sample's source
RawBox = tuple[Any, ...]  # x1, y1, x2, y2 in pixels, not validated
Converted = tuple[str, str, Sample, bytes | None]  # split, key, sample, image; ordered by the input files alone
Numbered = tuple[int, int, Any]  # number in the sample's key, line or record number in the file, record


@dataclass(frozen=True)
class Rejection:
    """A record that could not be converted. `line` counts from 1; in a JSON file it is the number of the record."""

    file: str
    line: int
    reason: str
    record: str = field(repr=False)


@dataclass
class BuildReport:
    """Counts of a build. Converters fill `notes`, `rejected` and `unusable`; `build` fills the others."""

    dataset: str
    limit: int | None = None
    samples: Counter[str] = field(default_factory=Counter)
    images: int = 0
    missing_images: int = 0
    examples_missing: list[str] = field(default_factory=list)
    """The names of the first missing images."""
    unusable: list[str] = field(default_factory=list)
    """Image files left out because they cannot be loaded (`load_image`). They also count as missing."""
    notes: Counter[str] = field(default_factory=Counter)
    """Irregularities of the input files that were resolved, with their number."""
    rejected: list[Rejection] = field(default_factory=list)
    rejected_file: Path | None = None

    def count_image(self, name: str | None, image: bytes | None) -> None:
        """Count the image of a sample, which may name none."""
        self.images += image is not None
        if name and image is None:
            self.missing_images += 1
            self.examples_missing += [name][: 3 - len(self.examples_missing)]

    def full(self, split: str) -> bool:
        """Return whether the split has `limit` samples already."""
        return self.limit is not None and self.samples[split] >= self.limit

    def reject(self, origin: Origin, reason: str, record: Any) -> None:
        """Add a rejection; `origin` can be the source of the record's sample."""
        text = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False, default=repr)
        self.rejected.append(Rejection(origin["file"], origin["line"], reason, text))

    def attempt(self, make: Callable[[Any, Origin], Made], record: Any, origin: Origin) -> Made | None:
        """Return ``make(record, origin)``, or None after rejecting the record for the error that it raised."""
        try:
            return make(record, origin)
        except UserError:
            raise
        except KeyError as error:
            reason = f"{error} is missing"
        except (ValueError, TypeError, IndexError, AttributeError, SyntaxError) as error:
            reason = str(error)
        except (RecursionError, MemoryError) as error:  # raised for a deeply nested Python or JSON literal
            reason = f"nested too deeply ({type(error).__name__})"
        self.reject(origin, reason, record)
        return None

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        splits = ", ".join(f"{count} {split}" for split, count in self.samples.items()) or "no samples"
        lines = [f"{self.dataset}: {splits}", f"images: {self.images} written, {self.missing_images} missing"]
        named = self.images + self.missing_images
        if self.missing_images > LOUD_SHARE * named:
            examples = ", ".join(self.examples_missing)
            lines.append(f"WARNING: {self.missing_images} of {named} images are missing, for example {examples}.")
            lines.append("Check --images, and that the names in the annotations equal those of the files.")
        if self.unusable:
            lines.append(f"unusable image files: {len(self.unusable)} (first: {self.unusable[0]})")
        lines += [f"{note}: {count}" for note, count in sorted(self.notes.items()) if count]
        if self.rejected:
            first = self.rejected[0]
            lines.append(f"rejected: {len(self.rejected)} (first: {first.file}, line {first.line}: {first.reason})")
        if self.rejected_file:
            lines.append(f"rejected records: {self.rejected_file}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Converter:
    """A dataset's description, and the function from (input directory, image directory, report) to its samples."""

    spec: DatasetSpec
    convert: Callable[[Path, Path | None, BuildReport], Iterator[Converted]]


def published_spec(name: str) -> DatasetSpec:
    """Describe a published dataset, by published.yaml."""
    entry = _PUBLISHED[name]
    return DatasetSpec(name, entry["task"], tuple(entry["labels"]), entry["labels"], entry.get("reference_f1", {}))


def convert_splits(
    paths: Mapping[str, Path],
    read: Callable[[Path], Iterable[Numbered]],
    make: Callable[[Any, Origin], Sample],
    images: Path | None,
    report: BuildReport,
    default_name: str = "text",
) -> Iterator[Converted]:
    """Convert each split's records until it is full; an error of `make` rejects the record.

    The key of a sample without an image has the name of its sentence, or `default_name`.
    """
    image_files = ImageFiles(images, report.unusable)
    for split, path in paths.items():
        for number, line, record in read(path):
            if report.full(split):
                break
            sample = report.attempt(make, record, {"file": path.name, "line": line})
            if sample is not None:
                image = sample["image"]
                name = Path(image).stem if image else sample["source"].get("sentence", default_name)
                yield split, make_key(number, str(name)), sample, image_files.read(image)


def numbered_lines(path: Path) -> Iterator[Numbered]:
    """Yield the lines of a file that are not blank, numbered from 1."""
    return ((number, number, line) for number, line in enumerate(read_lines(path), 1) if line.strip())


def image_name(name: str) -> str:
    """Return `name`. Raises ValueError unless it is a file name or a path that cannot leave the image directory."""
    if "\\" in name or not all(part and part[0] != "." for part in name.split("/")):
        raise ValueError(f"the image name {name[:80]!r} is neither a file name nor a path below --images")
    return name


def hashed_split(group: str) -> str:
    """Return ``dev`` for about a tenth of the groups, independently of the other groups, else ``train``."""
    return "dev" if int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10 == 0 else "train"


def make_key(number: int, name: str) -> str:
    """Return a sample's key: its number, which sorts, and the characters of `name` that a key allows."""
    return f"{number:06d}_{re.sub(r'[^A-Za-z0-9]+', '-', name)[:70]}"


def make_sample(
    spec: DatasetSpec,
    tokens: list[str],
    source: Origin,
    *,
    image: str | None = None,
    objects: Iterable[Mapping[str, Any]] = (),
    **annotations: Any,
) -> Sample:
    """Build a sample with the fields that all samples have; `annotations` is entities, relation ..., layout."""
    head = {"dataset": spec.name, "task": spec.task, "text": " ".join(tokens), "tokens": tokens}
    return {**head, "image": image, "objects": list(objects), **annotations, "source": source}


def number_boxes(boxes: Iterable[RawBox]) -> dict[RawBox, str]:
    """Number the distinct boxes O1, O2 ... by coordinates. Raises TypeError if these cannot be compared."""
    return {box: f"O{number}" for number, box in enumerate(sorted(set(boxes)), 1)}


def box_objects(ids: Mapping[RawBox, str], labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Build the objects of numbered boxes; `labels` maps an id to a label."""
    return [{"id": item, "box": list(box), "label": (labels or {}).get(item, "")} for box, item in ids.items()]


def token_list(value: object) -> list[str]:
    """Return a copy of a record's tokens. Raises ValueError unless they are a list of strings."""
    if not (isinstance(value, list) and all(isinstance(token, str) for token in value)):
        raise ValueError("the tokens are not a list of strings")
    return list(value)


def mention(tokens: list[str], start: int, end: int) -> dict[str, Any]:
    """Return ``{"text", "span"}`` of a half-open token span. Raises ValueError if it is empty or outside the tokens."""
    if not (type(start) is int and type(end) is int and 0 <= start < end <= len(tokens)):
        raise ValueError(f"the span [{start}, {end}] is empty, reversed or outside the {len(tokens)} tokens")
    return {"text": " ".join(tokens[start:end]), "span": [start, end]}


def published_mention(tokens: list[str], item: Mapping[str, Any], report: BuildReport) -> dict[str, Any]:
    """Return the mention of a published ``{"start", "end", "text"}``; its span is used if the text differs."""
    found = mention(tokens, item["start"], item["end"])
    if found["text"] != item["text"]:
        extent = "spaces only" if without_spaces(found["text"]) == without_spaces(item["text"]) else "more"
        report.notes[f"mentions that differ from their span in {extent}; the span is kept"] += 1
    return found


def without_spaces(text: str) -> str:
    """Return `text` without white space, which a mention and its published name can differ in."""
    return "".join(text.split())


def find_spans(tokens: list[str], name: str) -> list[tuple[int, int]]:
    """Return the half-open spans of the tokens that spell `name`, ignoring spaces."""
    name = without_spaces(name)
    spans = []
    for start, token in enumerate(tokens):
        text, end = without_spaces(token), start + 1
        while text and name.startswith(text) and text != name and end < len(tokens):
            text, end = text + without_spaces(tokens[end]), end + 1
        if name and text == name:
            spans.append((start, end))
    return spans


def find_inputs(input_dir: Path, files: Files, published: str) -> dict[str, Path]:
    """Return for each split the first of its files that exists. Raises UserError as `find_input` does."""
    return {split: find_input(input_dir, names, published) for split, names in files.items()}


def find_input(input_dir: Path, names: tuple[str, ...], published: str) -> Path:
    """Return the first of `names` that is a file in `input_dir`. Raises UserError with the place of publication."""
    if not input_dir.is_dir():
        raise UserError(f"{input_dir}: no such directory. The dataset is published at {published}.")
    found = [input_dir / name for name in names if (input_dir / name).is_file()]
    if not found:
        raise UserError(f"{input_dir}: contains no {' or '.join(names)}. It is published at {published}.")
    return found[0]


def read_bounded(path: Path) -> bytes:
    """Read a file. Raises UserError if it is larger than `MAX_INPUT_BYTES`."""
    size = path.stat().st_size
    if size > MAX_INPUT_BYTES:
        raise UserError(f"{path}: has {size} bytes, more than the {MAX_INPUT_BYTES} allowed. Check the file.")
    return path.read_bytes()


def read_lines(path: Path) -> list[str]:
    r"""Read the lines of a UTF-8 file, split at ``\n`` and ``\r\n`` only: tweets contain other line separators."""
    try:
        text = read_bounded(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Save or download it again.") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_json(data: bytes, where: str, expected: type) -> Any:
    """Decode JSON of the expected type (dict or list)."""
    try:
        value = files.parse_json(data)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}). Download it again if it is truncated.") from None
    if not isinstance(value, expected):
        raise UserError(f"{where}: not in the expected format (a JSON {expected.__name__} is expected).")
    return value
