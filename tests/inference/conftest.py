"""A tiny base and an adapter directory on it, for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.adapter_directory import save_adapter
from tests.helpers.tiny import save_tiny


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_tiny(directory)
    return directory


@pytest.fixture(scope="package")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter directory with random weights in all trained parts."""
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)
