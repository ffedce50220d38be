"""``lvlm-clorae train``: fine-tune a model in this process, which may be a rank of a launcher."""

from typing import NoReturn

from lvlm_clorae.training.main import entry


def main(argv: list[str]) -> NoReturn:
    """Run the training job and exit with its code."""
    entry(argv, "lvlm-clorae train")
