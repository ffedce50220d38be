"""SNAP: named entities in tweets with a picture (METHOD 7; Lu et al., ACL 2018).

Its authors give it on request, in the files of :mod:`conll` as RpBERT's loader reads them (train, dev, test).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lvlm_clorae.data.convert.common import BuildReport, Converted
from lvlm_clorae.data.convert.conll import convert_conll, entity_spec

PUBLISHED = "its authors (Lu et al., ACL 2018, aclanthology.org/P18-1185), on request"

SPEC = entity_spec("snap", 90.2)


def convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """The tweets of train, dev and test in the files' order. Raises UserError for a missing or unreadable file."""
    return convert_conll(SPEC, PUBLISHED, input_dir, images, report)
