"""Boxes of named entities in pictures, in Pascal VOC's XML, for samples of entities (``--boxes``).

Published for Twitter-15 and Twitter-17 by GMNER (Yu et al., ACL 2023) at github.com/NUSTM/GMNER, folders
Twitter10000/xml and Twitter10000_v2.0/xml: ``<picture's id>.xml`` with

    <annotation><object><name>Ann Lee</name><bndbox><xmin>132</xmin><ymin>22</ymin>...</bndbox></object></annotation>

A name is the text of an entity, so it would give the answer away as an object's label: it is kept in the sample's
``source["boxes"]`` only, as ``{"O1": ["Ann Lee"]}``.
"""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NoReturn

from lvlm_clorae.data.convert.common import Box, BuildReport, number_boxes
from lvlm_clorae.errors import UserError

MAX_XML_BYTES = 1 << 20
"""Bytes of the largest XML file that is read; the published ones have at most a few thousand."""


class VocBoxes:
    """The XML files below a folder, by picture. Raises UserError where `root` is no directory or holds none."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such directory of boxes. Leave --boxes out to build without.")
        self._paths: dict[str, Path] = {}
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                if name.endswith(".xml"):
                    self._paths.setdefault(Path(name).stem, Path(folder, name))
        if not self._paths:
            raise UserError(f"{root}: no .xml file in it. Boxes are <picture's id>.xml, as in github.com/NUSTM/GMNER.")

    def attach(self, sample: dict[str, Any], report: BuildReport) -> None:
        """Make the boxes of the sample's picture its objects. One that has objects already keeps its own.

        Raises UserError, naming the file, where it is no VOC file or could harm the reader.
        """
        path = self._paths.get(Path(sample["image"] or "").stem)
        if path is None or sample["objects"]:
            return
        try:
            named = [box for box in _read(path) if _is_box(box[0], report)]
        except (ET.ParseError, ValueError, LookupError) as error:
            raise UserError(f"its boxes, {path.name}: {error}") from None
        ids = number_boxes(box for box, _ in named)
        sample["objects"] = [{"id": item, "box": list(box), "label": ""} for box, item in ids.items()]
        names: dict[str, list[str]] = {item: [] for item in ids.values()}
        for box, name in named:
            names[ids[box]].append(name)
        sample["source"]["boxes"] = names
        report.notes["samples with boxes"] += 1


class _Builder(ET.TreeBuilder):
    """Builds no tree of a document with a DOCTYPE, the only place where entities can be declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise ValueError("has a DOCTYPE, which a VOC file has not and whose entities could fill the memory")


def _read(path: Path) -> list[tuple[Box, str]]:
    """(box, name) of each object. Raises ValueError, LookupError or ParseError for what is no VOC file."""
    size = path.stat().st_size
    if size > MAX_XML_BYTES:
        raise ValueError(f"has {size} bytes, more than the {MAX_XML_BYTES} allowed")
    root = ET.fromstring(path.read_bytes(), parser=ET.XMLParser(target=_Builder()))
    return [
        (tuple(_number(item, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")), (name.text or "").strip())
        for item in root.iter("object")
        for name in item.findall("name")
        if item.find("bndbox") is not None  # an entity that the picture does not show
    ]


def _number(item: ET.Element, where: str) -> float:
    """A finite number; an int where it is whole."""
    text = item.findtext(where)
    if text is None:
        raise ValueError(f"an object has no {where}")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{where} is {text.strip()}")
    return int(value) if value.is_integer() else value


def _is_box(box: Box, report: BuildReport) -> bool:
    sound = bool(box[0] < box[2] and box[1] < box[3])
    report.notes["boxes left out, for they are empty or reversed"] += not sound
    return sound
