"""What the tests share where they run side by side (``pytest -n 2 --dist loadfile``)."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the cores are shared
