"""A process group of one rank, for code that calls collectives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def process_group() -> Iterator[None]:
    from lvlm_clorae.training import distributed

    distributed.start()
    yield
    distributed.stop()
