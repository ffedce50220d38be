"""A project directory as a user has it."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers.launch import REPOSITORY

SLURM_PAGE, HOSTS_PAGE = REPOSITORY / "slurm/README.md", REPOSITORY / "docs/multi_node.md"
SETTINGS = [
    "--per_device_train_batch_size",
    2,
    "--num_train_epochs",
    1,
    "--logging_steps",
    1,
    "--max_target_length",
    16,
]
"""Settings of a short run: 30 steps on two ranks with the fixture ``shards``."""


def project(directory: Path) -> Path:
    """Create a directory with copies of the batch scripts and links to what they use."""
    shutil.copytree(REPOSITORY / "slurm", directory / "slurm", ignore=shutil.ignore_patterns("*.out"))
    for name in ("train.py", "ds_configs"):
        (directory / name).symlink_to(REPOSITORY / name)
    return directory
