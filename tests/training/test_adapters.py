"""Each value of ``--adapter`` trains, exports and loads in the extractor; its parameters, scale and auxiliary loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.adapters.register import method_names
from lvlm_clorae.errors import UserError
from lvlm_clorae.inference.extractor import Extractor
from lvlm_clorae.inference.records import Entity
from lvlm_clorae.models.loading import describe_model, load_model
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config import TrainConfig
from tests.helpers.fork_server import train
from tests.helpers.launch import small_shards

SETTINGS = [
    "--lora_rank",
    4,
    "--num_train_epochs",
    1,
    "--max-steps",
    3,
    "--per_device_train_batch_size",
    2,
    "--max_target_length",
    8,
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("adapters") / "shards", train=6, dev=2, test=2)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [*(name for name in method_names() if name != "clorae"), "full"])
def test_every_other_adapter_trains_and_loads(adapter: str, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, 1, "--adapter", adapter, "--shards", shards, *SETTINGS)
    scores = json.loads((run / "scores.json").read_text())
    assert len(scores["dataset_tasks"]) == 5
    records = Extractor.from_pretrained(run / "adapter").extract("Mara sings", task="mner")
    assert all(isinstance(record, Entity) for record in records)


@pytest.mark.parametrize(
    ("targets", "named"), [(["nope"], "nope.* q, v"), (["layer_norm"], "layer_norm"), (["q", "vv"], '"vv".* q, v')]
)
@pytest.mark.parametrize("adapter", ["clorae", "lora"])
def test_a_target_module_that_is_no_linear_layer_is_an_error(adapter: str, targets: list[str], named: str) -> None:
    config = TrainConfig(adapter=adapter, lora_rank=4, target_modules=targets)
    with pytest.raises(UserError, match=f"target_modules.*{named}"):
        add_adapter(describe_model("demo"), config, ["mner"])


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
def test_ablations_have_no_parameters_of_the_removed_part(settings: dict[str, Any], without: set[str]) -> None:
    model, _ = load_model("demo")
    model = add_adapter(model, TrainConfig(lora_rank=4, **settings), ["mner", "mre", "mee"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained if "clorae_experts" in name} == EVERY - without
    assert {name for name in trained if "clorae_experts" not in name} == {
        name for name in trained if ".projector.modules_to_save." in name
    }


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 2 * 2 * 4),  # an even gate halves it
        ({"use_gate": False}, 2 * 4),
        ({"adapter": "lora"}, 2 * 4),
        ({"adapter": "moslora"}, 2 * 4),
        ({"adapter": "loramoe"}, 6 * 2 * 4),
        ({"adapter": "hydralora"}, 3 * 2 * 4),
        ({"adapter": "mtllora"}, 2 * 4),
        ({"lora_alpha": 3.0}, 3),
        ({"adapter": "lora", "lora_alpha": 3.0}, 3),
    ],
)
def test_initial_scale_is_that_of_lora(settings: dict[str, Any], alpha: float) -> None:
    model = add_adapter(describe_model("demo"), TrainConfig(lora_rank=4, **settings), ["mner", "mre", "mee"])
    assert model.peft_config["default"].lora_alpha == alpha
