"""``lvlm-clorae align``: train the projector of a new base on captions, as ``train`` with ``--adapter projector``."""

from typing import NoReturn

from lvlm_clorae.training.config import PROJECTOR
from lvlm_clorae.training.main import entry


def main(argv: list[str]) -> NoReturn:
    """Run the training job and exit with its code."""
    entry([*argv, "--adapter", PROJECTOR], "lvlm-clorae align")
