"""Selection of dataset tasks and their reference F1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.index import Index, load_index
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import load_config
from lvlm_clorae.training.dataset_tasks import choose_dataset_tasks
from tests.helpers.launch import small_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return load_index(small_shards(tmp_path_factory.mktemp("dataset_tasks") / "shards", train=2, dev=1, test=1))


def test_by_default_all_dataset_tasks_are_trained(index: Index) -> None:
    dataset_tasks = choose_dataset_tasks(index, TrainConfig())
    assert (
        list(dataset_tasks.train)
        == list(dataset_tasks.dev)
        == list(dataset_tasks.test)
        == list(index.dataset_tasks("train"))
    )
    assert dataset_tasks.reference() == {
        f"{name}/{subtask}": f1 for name, entry in index.datasets.items() for subtask, f1 in entry.reference_f1.items()
    }


def test_held_out_datasets_are_only_tested(index: Index) -> None:
    dataset_tasks = choose_dataset_tasks(index, load_config(["--hold-out", "demo_news"]))
    assert "demo_news/entity" not in dataset_tasks.train
    assert (
        list(dataset_tasks.train)
        == list(dataset_tasks.dev)
        == [name for name in index.dataset_tasks("train") if "news" not in name]
    )
    assert list(dataset_tasks.test) == list(index.dataset_tasks("test"))


def test_reference_f1_can_be_set(index: Index) -> None:
    dataset_tasks = choose_dataset_tasks(
        index, load_config(["--reference-f1", "demo_pairs/relation=42.5", "demo_events/trigger=100"])
    )
    assert dataset_tasks.reference()["demo_pairs/relation"] == 42.5
    assert dataset_tasks.reference()["demo_events/trigger"] == 100.0
    assert dataset_tasks.reference()["demo_posts/entity"] == 90.0
    assert dataset_tasks.test["demo_pairs/relation"].reference_f1 == 42.5


def test_the_default_reference_f1_is_100(index: Index) -> None:
    dataset_tasks = choose_dataset_tasks(index, TrainConfig())
    dataset_tasks.train["demo_posts/entity"] = dataset_tasks.train["demo_posts/entity"].__class__(
        **{**vars(dataset_tasks.train["demo_posts/entity"]), "reference_f1": None}
    )
    assert dataset_tasks.reference()["demo_posts/entity"] == 100.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hold_out": ["demo_new"]}, '"demo_new".*"demo_news"'),
        ({"hold_out": ["demo_pairs"]}, "hold_out.*mre"),
        ({"hold_out": ["demo_posts", "demo_news"]}, "hold_out.*mner"),
        ({"reference_f1": ["demo_pairs=80"]}, '"demo_pairs".*"demo_pairs/relation"'),
        ({"reference_f1": ["demo_pairs/relation"]}, '"demo_pairs/relation".*demo_pairs/relation='),
        ({"reference_f1": ["demo_pairs/relation=high"]}, "relation=high"),
        ({"reference_f1": ["demo_pairs/relation=0"]}, "relation=0"),
        ({"reference_f1": ["demo_pairs/relation=101"]}, "relation=101"),
        ({"reference_f1": ["demo_pairs/relation=50", "demo_pairs/relation=60"]}, "given twice"),
    ],
)
def test_invalid_settings_are_reported(settings: dict[str, Any], message: str, index: Index) -> None:
    with pytest.raises(UserError, match=message):
        choose_dataset_tasks(index, TrainConfig(**settings))


def test_a_dataset_without_a_test_split_cannot_be_held_out(tmp_path: Path) -> None:
    index = load_index(small_shards(tmp_path / "shards", train=2, dev=1, test=0))
    with pytest.raises(UserError, match='"demo_news"'):
        choose_dataset_tasks(index, TrainConfig(hold_out=["demo_news"]))
