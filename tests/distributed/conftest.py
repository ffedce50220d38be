"""Fixtures of the tests on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lvlm_clorae.models.families.t5 import VisionT5, VisionT5Config
from lvlm_clorae.models.processor import Processor
from tests.helpers.fork_server import ForkServer, shared_server
from tests.helpers.launch import REPOSITORY

DEMO = REPOSITORY / "lvlm_clorae/models/demo"


@pytest.fixture(scope="session")
def server() -> ForkServer:
    return shared_server()


@pytest.fixture(scope="module")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base with random weights, since its own amplify rounding errors (docs/training.md)."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    VisionT5(VisionT5Config.from_pretrained(DEMO)).save_pretrained(directory)
    Processor.from_pretrained(DEMO).save_pretrained(directory)
    return directory
