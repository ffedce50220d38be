"""Pascal VOC boxes of named entities in images, for entity datasets (``--boxes``).

GMNER (Yu et al., ACL 2023) publishes them for Twitter-15 and Twitter-17 at github.com/NUSTM/GMNER, folders
Twitter10000/xml and Twitter10000_v2.0/xml: ``<image id>.xml`` with

    <annotation><object><name>Ann Lee</name><bndbox><xmin>132</xmin><ymin>22</ymin>...</bndbox></object></annotation>

A name is the text of an entity and would reveal the answer as an object's label. It is only kept in the sample's
``source["boxes"]``, as ``{"O1": ["Ann Lee"]}``.
"""

import filecmp
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NoReturn

from lvlm_clorae.data.convert import common
from lvlm_clorae.data.convert.common import BuildReport, Sample
from lvlm_clorae.data.convert.image_files import walk_files
from lvlm_clorae.errors import UserError

MAX_XML_BYTES = 1 << 20  # the published files have a few thousand


class VocBoxes:
    """The XML files below a directory, by image. Raises UserError if `root` is no directory or contains none."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such directory of boxes. Omit --boxes to build without boxes.")
        self._paths: dict[str, Path] = {}
        for path in walk_files(root):
            if path.suffix != ".xml":
                continue
            first = self._paths.setdefault(path.stem, path)
            if not filecmp.cmp(first, path, shallow=False):
                raise UserError(f"{first} and {path} are different boxes of one image. Keep one of them.")
        if not self._paths:
            raise UserError(f"{root}: contains no .xml file. Boxes are <image id>.xml, as in github.com/NUSTM/GMNER.")

    def attach(self, sample: Sample, report: BuildReport) -> None:
        """Add the boxes of the image as objects of a sample without objects. Raises UserError for an unsafe file."""
        path = self._paths.get(Path(sample["image"] or "").stem)
        if path is None or sample["objects"]:
            return
        try:
            found = _read(path)
        except (ET.ParseError, ValueError, LookupError) as error:
            raise UserError(f"its boxes, {path.name}: {error}") from None
        named = [(box, name) for box, name in found if box[0] < box[2] and box[1] < box[3]]
        report.notes["boxes left out because they are empty or reversed"] += len(found) - len(named)
        ids = common.number_boxes(box for box, _ in named)
        sample["objects"] = common.box_objects(ids)
        names: dict[str, list[str]] = {item: [] for item in ids.values()}
        for box, name in named:
            names[ids[box]].append(name)
        sample["source"]["boxes"] = names
        report.notes["samples with boxes"] += 1


class _Builder(ET.TreeBuilder):
    """Refuses a document with a DOCTYPE, the only place in which entities can be declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise ValueError("has a DOCTYPE, which VOC files do not have and whose entities could exhaust the memory")


def _read(path: Path) -> list[tuple[common.RawBox, str]]:
    """Return (box, name) of each object. Raises ValueError, LookupError or ParseError for a file of another form."""
    size = path.stat().st_size
    if size > MAX_XML_BYTES:
        raise ValueError(f"has {size} bytes, more than the {MAX_XML_BYTES} allowed")
    root = ET.fromstring(path.read_bytes(), parser=ET.XMLParser(target=_Builder()))
    return [
        (tuple(_number(item, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")), (name.text or "").strip())
        for item in root.iter("object")
        for name in item.findall("name")
        if item.find("bndbox") is not None  # an entity that the image does not show has no box
    ]


def _number(item: ET.Element, where: str) -> float:
    """Return a finite number, as an int if it is integral."""
    text = item.findtext(where)
    if text is None:
        raise ValueError(f"an object has no {where}")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{where} is {text.strip()}")
    return int(value) if value.is_integer() else value
