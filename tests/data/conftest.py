"""Small shards of the demo, read by several tests of lvlm_clorae.data; a file may have its own under these names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import Index, load_index
from lvlm_clorae.models import Processor
from tests.helpers.launch import REPOSITORY, small_shards


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("demo") / "shards", train=12, dev=5, test=2)


@pytest.fixture(scope="package")
def index(directory: Path) -> Index:
    return load_index(directory)


@pytest.fixture
def dataset(directory: Path, index: Index) -> ShardDataset:
    return ShardDataset(index, directory)


@pytest.fixture(scope="package")
def processor() -> Processor:
    return Processor.from_pretrained(REPOSITORY / "lvlm_clorae/models/demo")
