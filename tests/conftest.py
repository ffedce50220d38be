"""How the tests are spread over processes (``pytest -n 2 --dist loadgroup``)."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the cores are shared


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process for the tests of a cluster, which share it, and for those of a file that starts ranks."""
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.xdist_group("cluster"))
        elif item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
