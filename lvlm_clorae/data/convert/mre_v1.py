"""MNRE V1: the relation between two names of a tweet with a picture (METHOD 7).

Published at github.com/thecharm/MNRE, Version-1, in the lines of :mod:`mnre`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lvlm_clorae.data.convert.common import BuildReport, Converted
from lvlm_clorae.data.convert.mnre import convert_mnre, relation_spec

RELATIONS = [
    "none",
    "/loc/loc/administration_divisions",
    "/loc/loc/capital",
    "/loc/loc/contain",
    "/misc/loc/held_on",
    "/misc/misc/part_of",
    "/org/loc/locate_at",
    "/org/org/alternate_names",
    "/org/org/subsidiary",
    "/per/loc/place_of_birth",
    "/per/loc/place_of_death",
    "/per/loc/place_of_residence",
    "/per/misc/awarded",
    "/per/misc/creat",
    "/per/misc/nationality",
    "/per/misc/present_in",
    "/per/misc/race",
    "/per/misc/religion",
    "/per/org/founder_of",
    "/per/org/leader",
    "/per/org/member_of",
    "/per/per/alternate_names",
    "/per/per/charges",
    "/per/per/classmate",
    "/per/per/colleague",
    "/per/per/couple",
    "/per/per/neighbor",
    "/per/per/parent",
    "/per/per/peer",
    "/per/per/relative",
    "/per/per/siblings",
]
FILES = {"train": ("ours_train.txt",), "dev": ("ours_val.txt",), "test": ("ours_test.txt",)}
PUBLISHED = "github.com/thecharm/MNRE, folder Version-1"

SPEC = relation_spec("mre_v1", RELATIONS, 81.8)


def convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """The records of train, dev and test in the files' order. Raises UserError for a missing or unreadable file."""
    return convert_mnre(SPEC, FILES, PUBLISHED, input_dir, images, report)
