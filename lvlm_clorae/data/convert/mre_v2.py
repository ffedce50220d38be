"""MNRE V2: V1 refined and extended, its relations merged into 23 (METHOD 7).

Published at github.com/thecharm/MNRE, mnre_txt, in the lines of :mod:`mnre`; the space in ``mnre_val .txt`` is real.
MKGFormer and HVPNeT hand the same data on as ours_train.txt, ours_val.txt and ours_test.txt, the names of V1: there the
relations tell which it is, for V1's that V2 has not are unknown labels here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lvlm_clorae.data.convert.common import BuildReport, Converted
from lvlm_clorae.data.convert.mnre import convert_mnre, relation_spec

RELATIONS = [
    "none",
    "/loc/loc/contain",
    "/misc/loc/held_on",
    "/misc/misc/part_of",
    "/org/loc/locate_at",
    "/org/org/alternate_names",
    "/org/org/subsidiary",
    "/per/loc/place_of_birth",
    "/per/loc/place_of_residence",
    "/per/misc/awarded",
    "/per/misc/nationality",
    "/per/misc/present_in",
    "/per/misc/race",
    "/per/misc/religion",
    "/per/org/member_of",
    "/per/per/alternate_names",
    "/per/per/alumi",
    "/per/per/charges",
    "/per/per/couple",
    "/per/per/neighbor",
    "/per/per/parent",
    "/per/per/peer",
    "/per/per/siblings",
]
FILES = {
    "train": ("mnre_train.txt", "ours_train.txt"),
    "dev": ("mnre_val .txt", "mnre_val.txt", "ours_val.txt"),
    "test": ("mnre_test.txt", "ours_test.txt"),
}
PUBLISHED = "github.com/thecharm/MNRE, folder mnre_txt"

SPEC = relation_spec("mre_v2", RELATIONS, 82.0)


def convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """The records of train, dev and test in the files' order. Raises UserError for a missing or unreadable file."""
    return convert_mnre(SPEC, FILES, PUBLISHED, input_dir, images, report)
