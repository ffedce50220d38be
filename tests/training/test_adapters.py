"""Each choice of ``--adapter`` trains, exports and is loaded again by the extractor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.extractor import Extractor
from lvlm_clorae.models.loading import describe_model, load_model
from lvlm_clorae.records import Entity
from lvlm_clorae.training.adapters import adapter_config, add_adapter
from lvlm_clorae.training.config import TrainConfig
from tests.launch import small_shards, train

SETTINGS = ["--rank", 4, "--epochs", 1, "--max-steps", 3, "--micro-batch", 2, "--max-answer-length", 8]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("adapters") / "shards", train=6, dev=2, test=2)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "moslora", "loramoe", "full"])
def test_other_adapters(adapter: str, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, 1, "--adapter", adapter, "--shards", shards, *SETTINGS)
    scores = json.loads((run / "scores.json").read_text())
    assert len(scores["units"]) == 5
    records = Extractor.from_pretrained(run / "adapter").extract("Mara sings", task="mner")
    assert all(isinstance(record, Entity) for record in records)


EVERY = {"universal_A", "universal_B", "expert_A", "expert_B", "gate", "mim_scale", "mim_rho"}


@pytest.mark.parametrize(
    ("settings", "without"),
    [
        ({}, set()),
        ({"use_universal": False}, EVERY - {"expert_A", "expert_B"}),
        ({"use_experts": False}, EVERY - {"universal_A", "universal_B"}),
        ({"use_gate": False}, {"gate"}),
        ({"beta": 0.0}, {"mim_scale", "mim_rho"}),
    ],
)
def test_ablations_leave_out_their_parameters(settings: dict[str, Any], without: set[str]) -> None:
    model, _ = load_model("demo")
    model = add_adapter(model, TrainConfig(rank=4, **settings), ["mner", "mre", "mee"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained if "clorae_experts" in name} == EVERY - without
    assert {name for name in trained if "clorae_experts" not in name} == {
        name for name in trained if ".projector.modules_to_save." in name
    }


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 2 * 2 * 4),  # what an even gate divides it by
        ({"use_gate": False}, 2 * 4),
        ({"adapter": "lora"}, 2 * 4),
        ({"adapter": "moslora"}, 2 * 4),
        ({"adapter": "loramoe"}, 6 * 2 * 4),
        ({"alpha": 3.0}, 3),
        ({"adapter": "lora", "alpha": 3.0}, 3),
    ],
)
def test_the_scale_is_that_of_lora_before_training(settings: dict[str, Any], alpha: float) -> None:
    config = adapter_config(describe_model("demo"), TrainConfig(rank=4, **settings), ["mner", "mre", "mee"])
    assert config.lora_alpha == alpha
