"""Twitter-15: named entities in tweets with a picture (METHOD 7; Zhang et al., AAAI 2018).

Published at github.com/jefferyYu/UMT, data/twitter2015, in the files of :mod:`conll`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lvlm_clorae.data.convert.common import BuildReport, Converted
from lvlm_clorae.data.convert.conll import convert_conll, entity_spec

PUBLISHED = "github.com/jefferyYu/UMT, folder data/twitter2015"

SPEC = entity_spec("twitter15", 78.9)


def convert(input_dir: Path, images: Path | None, report: BuildReport) -> Iterator[Converted]:
    """The tweets of train, dev and test in the files' order. Raises UserError for a missing or unreadable file."""
    return convert_conll(SPEC, PUBLISHED, input_dir, images, report)
