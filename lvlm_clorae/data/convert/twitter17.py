"""Twitter-17: UMT's part of SNAP's tweets, split anew (METHOD 7; Yu et al., ACL 2020).

Published at github.com/jefferyYu/UMT, data/twitter2017, in the files of :mod:`conll`; ids like ``17_06_12``, ``O_25``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lvlm_clorae.data.convert.common import BuildReport, Converted
from lvlm_clorae.data.convert.conll import convert_conll, entity_spec

PUBLISHED = "github.com/jefferyYu/UMT, folder data/twitter2017"

SPEC = entity_spec("twitter17", 89.8)


def convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """The tweets of train, dev and test in the files' order. Raises UserError for a missing or unreadable file."""
    return convert_conll(SPEC, PUBLISHED, input_dir, images, report)
