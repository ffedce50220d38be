"""Environment and markers of all tests (``unit`` is set here, the other markers in the test modules)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_UNIT = {"integration", "slow", "distributed", "cluster", "real_data"}

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the cores are shared
# One path for tests and the processes they start: DeepSpeed compiles its operators again if it finds another ninja.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# Many tests start processes, each of which would compile the whole package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not NOT_UNIT & {marker.name for marker in item.iter_markers()}:
            item.add_marker("unit")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The matplotlib figures that are saved."""
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *given: Any, **how: Any) -> None:
        kept.append(self)
        save(self, *given, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of one rank, for code that calls collectives."""
    from lvlm_clorae.training import distributed

    distributed.start()
    yield
    distributed.stop()


@pytest.fixture
def no_squeue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SLURM of the machine, which may not answer for seconds, has no part in the test."""
    monkeypatch.setattr("lvlm_clorae.sweep.status.shutil.which", lambda name: None)
