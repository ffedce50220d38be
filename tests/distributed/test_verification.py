"""Every machine verifies its own copy of the shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.fork_server import two_ranks
from tests.helpers.shards import write_toy

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_a_damaged_copy_on_any_machine_is_named_on_all(tmp_path: Path) -> None:
    for machine in ("machine0", "machine1"):
        write_toy(tmp_path / machine)
    two_ranks("verifying_worker.py", tmp_path)
    assert [(tmp_path / f"machine{rank}.txt").read_text() for rank in (0, 1)] == ["2", "2"]
    damaged = sorted((tmp_path / "machine1").glob("*.tar"))
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(data)
    two_ranks("verifying_worker.py", tmp_path)
    for rank in (0, 1):
        found = (tmp_path / f"machine{rank}.txt").read_text()
        assert all(f"{path} on machine1: " in found for path in damaged)
        assert "machine0" not in found
