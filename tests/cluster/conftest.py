"""Fixtures of the cluster tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.machines import need
from tests.cluster.project import SETTINGS
from tests.cluster.slurm import Slurm
from tests.helpers.fork_server import train
from tests.helpers.launch import small_shards


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    """A SLURM of three nodes."""
    need("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
    directory = Path(
        tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
    )  # munge's socket needs a short path with access for all
    directory.chmod(0o755)
    slurm = Slurm(directory)
    try:
        slurm.start(nodes=3)
        yield slurm
    finally:
        try:
            slurm.stop()
        finally:
            shutil.rmtree(directory)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("cluster") / "shards")


@pytest.fixture(scope="session")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference run: two ranks of this machine, uninterrupted."""
    directory = tmp_path_factory.mktemp("local") / "run"
    train(directory, 2, "--shards", shards, *SETTINGS)
    return directory
