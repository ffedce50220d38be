"""ShellCheck on the batch scripts."""

from __future__ import annotations

import subprocess

import pytest

from tests.cluster.machines import need
from tests.helpers.launch import REPOSITORY

pytestmark = pytest.mark.integration


def test_shellcheck_finds_nothing() -> None:
    need("shellcheck")
    scripts = sorted(path for path in (REPOSITORY / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))
    assert len(scripts) == 4
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, scripts)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
