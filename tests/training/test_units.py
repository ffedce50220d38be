"""What is trained, what is held out, and by which F1 each unit is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.index import Index, load_index
from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import TrainConfig, load_config
from lvlm_clorae.training.units import choose_units
from tests.launch import small_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return load_index(small_shards(tmp_path_factory.mktemp("units") / "shards", train=2, dev=1, test=1))


def test_by_default_everything_is_trained(index: Index) -> None:
    units = choose_units(index, TrainConfig())
    assert list(units.train) == list(units.dev) == list(units.test) == index.units("train")
    assert units.reference() == {
        f"{name}/{subtask}": f1 for name, entry in index.datasets.items() for subtask, f1 in entry.reference_f1.items()
    }


def test_what_is_held_out_is_tested_alone(index: Index) -> None:
    units = choose_units(index, load_config(["--hold-out", "demo_news"]))
    assert "demo_news/entity" not in units.train
    assert list(units.train) == list(units.dev) == [name for name in index.units("train") if "news" not in name]
    assert list(units.test) == index.units("test")


def test_a_reference_may_be_set(index: Index) -> None:
    units = choose_units(index, load_config(["--reference-f1", "demo_pairs/relation=42.5", "demo_events/trigger=100"]))
    assert units.reference()["demo_pairs/relation"] == 42.5
    assert units.reference()["demo_events/trigger"] == 100.0
    assert units.reference()["demo_posts/entity"] == 90.0
    assert units.test["demo_pairs/relation"].reference_f1 == 42.5


def test_without_a_reference_it_is_100(index: Index) -> None:
    units = choose_units(index, TrainConfig())
    units.train["demo_posts/entity"] = units.train["demo_posts/entity"].__class__(
        **{**vars(units.train["demo_posts/entity"]), "reference_f1": None}
    )
    assert units.reference()["demo_posts/entity"] == 100.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hold_out": ["demo_new"]}, 'no dataset "demo_new". Did you mean "demo_news"?'),
        ({"hold_out": ["demo_pairs"]}, "leaves no training data for mre"),
        ({"hold_out": ["demo_posts", "demo_news"]}, "leaves no training data for mner"),
        ({"reference_f1": ["demo_pairs=80"]}, 'no "demo_pairs". Did you mean "demo_pairs/relation"?'),
        ({"reference_f1": ["demo_pairs/relation"]}, '"demo_pairs/relation" gives no percentage. Write'),
        ({"reference_f1": ["demo_pairs/relation=high"]}, "gives no percentage"),
        ({"reference_f1": ["demo_pairs/relation=0"]}, "gives no percentage"),
        ({"reference_f1": ["demo_pairs/relation=101"]}, "gives no percentage"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str, index: Index) -> None:
    with pytest.raises(UserError) as caught:
        choose_units(index, TrainConfig(**settings))
    assert message in str(caught.value)


def test_a_dataset_without_a_test_split_is_not_held_out(tmp_path: Path) -> None:
    index = load_index(small_shards(tmp_path / "shards", train=2, dev=1, test=0))
    with pytest.raises(UserError, match='"demo_news" has no test split'):
        choose_units(index, TrainConfig(hold_out=["demo_news"]))
