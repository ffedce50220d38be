"""Tests side by side (``pytest -n 2 --dist loadgroup``): those of several ranks in one process, one after another."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the cores are shared


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("distributed") or item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.xdist_group("ranks"))
