"""A project's directory as a user has it, and the commands of the pages as they are typed there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.launch import REPOSITORY

SLURM_PAGE, HOSTS_PAGE = REPOSITORY / "slurm/README.md", REPOSITORY / "docs/multi_node.md"
SETTINGS = ["--micro-batch", 2, "--epochs", 1, "--log-every", 1, "--max-answer-length", 16]
"""Of a short run: 30 steps on two ranks and the samples of the fixture ``shards``."""


def project(directory: Path) -> Path:
    """A directory with what the commands name, the batch scripts in copy."""
    shutil.copytree(REPOSITORY / "slurm", directory / "slurm", ignore=shutil.ignore_patterns("*.out"))
    for name in ("train.py", "ds_configs"):
        (directory / name).symlink_to(REPOSITORY / name)
    return directory


def commands(page: Path, beginning: str) -> list[str]:
    """The lines of the page's code blocks that begin so."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    found = [line for line in text.splitlines() if line.startswith(beginning)]
    assert found, f"{page}: no command {beginning}"
    return found
