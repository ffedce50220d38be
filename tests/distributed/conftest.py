"""What the tests of several ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lvlm_clorae.models.processor import Processor
from lvlm_clorae.models.t5 import VisionT5, VisionT5Config
from tests.fork_server import ForkServer
from tests.launch import REPOSITORY

DEMO = REPOSITORY / "lvlm_clorae/models/demo"


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as running:
        yield running


@pytest.fixture(scope="module")
def fresh_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base's shape with fresh weights. Those of the demo base magnify rounding (docs/training.md)."""
    directory = tmp_path_factory.mktemp("fresh")
    torch.manual_seed(0)
    VisionT5(VisionT5Config.from_pretrained(DEMO)).save_pretrained(directory)
    Processor.from_pretrained(DEMO).save_pretrained(directory)
    return directory
