"""Image captions, for the alignment of a projector: a CSV file with the columns image and caption, or COCO's JSON.

    image,caption
    1000268201_693b08cb0e.jpg,A girl going into a wooden building .

    {"images": [{"id": 9, "file_name": "9.jpg"}, ...], "annotations": [{"image_id": 9, "caption": "A meal."}, ...]}

Every caption is a sample, so an image is in the shards once for each of its captions. No image is in two splits: of a
single file a tenth of the images, chosen by a hash of their names, is ``test``; of several files, one a split, a
caption whose image is in an earlier split is rejected. So is a caption without its image.
"""

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lvlm_clorae.data.convert import common
from lvlm_clorae.data.convert.common import BuildReport, Converted, Converter, Numbered, Origin, Sample
from lvlm_clorae.data.index import DatasetSpec
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks.schema import CAPTION

COLUMNS = ("image", "caption")
ONE_FILE = ("captions.csv", "captions.json")
FILES: common.Files = {
    "train": ("train.csv", "train.json", "captions_train2017.json", "captions_train2014.json"),
    "dev": ("dev.csv", "dev.json", "captions_val2017.json", "captions_val2014.json"),
    "test": ("test.csv", "test.json"),
}
HELD_OUT = 10
"""One in this number of images of a single file is held out."""

_Records = dict[str, tuple[Path, list[Numbered]]]


def folder_converter(input_dir: Path, name: str | None = None) -> Converter:
    """Build the converter of a directory with `ONE_FILE` or some of `FILES`; the dataset is called `name`.

    Raises UserError without such files, or for one that cannot be read.
    """
    records = _read(input_dir)
    spec = DatasetSpec(name or input_dir.resolve().name, CAPTION, (CAPTION,), {CAPTION: {}}, {})
    return Converter(spec, lambda _, images, report: _convert(spec, records, images, report))


def _convert(spec: DatasetSpec, records: _Records, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    split_of: dict[str, str] = {}
    for split, (path, found) in records.items():
        make = partial(_sample, spec, split, split_of)
        for converted in common.convert_splits({split: path}, lambda _: found, make, images, report):  # noqa: B023
            _, _, sample, image = converted
            if image is None:
                report.reject(sample["source"], f"the image {sample['image']} is missing or cannot be decoded", sample)
            else:
                yield converted


def _sample(
    spec: DatasetSpec, split: str, split_of: dict[str, str], record: Mapping[str, Any], origin: Origin
) -> Sample:
    image, caption = (record[name] for name in COLUMNS)
    if not (isinstance(image, str) and isinstance(caption, str)) or None in record:
        raise ValueError("the line has too few or too many columns; quote a caption that has commas")
    if "\n" in image + caption:
        raise ValueError("the caption has a line break; is a quote before it not closed?")
    if split_of.setdefault(image, split) != split:
        raise ValueError(f"the image {image} is also in {split_of[image]}")
    return common.make_sample(spec, [], origin, image=common.image_name(image), caption=" ".join(caption.split()))


def _read(input_dir: Path) -> _Records:
    """Return the file and the records of each split."""
    if not input_dir.is_dir():
        raise UserError(f"{input_dir}: no such directory. Set --input to the directory of the captions.")
    paths = {
        split: input_dir / name
        for split, names in FILES.items()
        for name in reversed(names)  # the first name is preferred
        if (input_dir / name).is_file()
    }
    whole = [input_dir / name for name in ONE_FILE if (input_dir / name).is_file()]
    if len(whole) + bool(paths) != 1:
        known = ", ".join(name for names in FILES.values() for name in names)
        raise UserError(
            f"{input_dir}: contains {'more than one' if whole else 'none'} of {', '.join(ONE_FILE)} and files of "
            f"splits ({known}). Give one file, or one a split."
        )
    if paths:
        return {split: (path, _read_file(path)) for split, path in paths.items()}
    records = _read_file(whole[0])
    names = sorted({str(record["image"]) for *_, record in records}, key=_hash)
    held_out = set(names[: -(-len(names) // HELD_OUT)] if len(names) > 1 else ())
    found: dict[str, list[Numbered]] = {"train": [], "test": []}
    for item in records:
        found["test" if str(item[2]["image"]) in held_out else "train"].append(item)
    return {split: (whole[0], items) for split, items in found.items()}


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()


def _read_file(path: Path) -> list[Numbered]:
    records = _read_csv(path) if path.suffix == ".csv" else _read_coco(path)
    if not records:
        raise UserError(f"{path}: there are no captions. Check the file.")
    return [(number, line, record) for number, (line, record) in enumerate(records, 1)]


def _read_csv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO("\n".join(common.read_lines(path)), newline=""), strict=True)
    try:
        records = [(reader.line_num, record) for record in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: not CSV ({error}). Is a quote not closed?") from None
    if missing := set(COLUMNS) - set(reader.fieldnames or ()):
        raise UserError(f"{path}: has no column {' or '.join(sorted(missing))}. Its first line must be image,caption.")
    return records


def _read_coco(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the annotations, by image in the order of the file."""
    content = common.parse_json(common.read_bounded(path), str(path), dict)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        order = {image: number for number, image in enumerate(names)}
        records = [
            (number, (order[item["image_id"]], {"image": names[item["image_id"]], "caption": item["caption"]}))
            for number, item in enumerate(content["annotations"], 1)
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not COCO's captions ({type(error).__name__} {error}). Download it again.") from None
    return [(number, record) for number, (_, record) in sorted(records, key=lambda item: item[1][0])]
