"""The DeepSpeed file: "auto" is filled in, contradictions are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.deepspeed_config import read_deepspeed_file, resolve

CONFIG = TrainConfig(micro_batch=4, accumulation=3, gradient_clipping=0.5)
SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def resolved(content: dict[str, Any], *, ranks: int = 2, bf16: bool = False) -> dict[str, Any]:
    return resolve(content, CONFIG, ranks, bf16, "ds.json")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_shipped_files(path: Path, bf16: bool) -> None:
    content = read_deepspeed_file(path)
    before = json.dumps(content)
    settings = resolved(content, bf16=bf16)
    assert json.dumps(content) == before
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["train_batch_size"] == 24
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"] is bf16
    assert '"auto"' not in json.dumps(settings)


def test_shipped_files_are_found() -> None:
    assert {"zero2.json", "zero3.json"} <= {path.name for path in SHIPPED}


def test_an_empty_file_is_filled() -> None:
    settings = resolved({})
    assert settings["train_batch_size"] == 24
    assert settings["zero_optimization"]["stage"] == 0
    assert settings["bf16"] == {"enabled": False}


def test_equal_values_may_be_written_out() -> None:
    content = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}
    assert resolved(content, bf16=True)["train_batch_size"] == 24


def test_fp16_left_to_us_is_off() -> None:
    assert resolved({"fp16": {"enabled": "auto"}})["fp16"]["enabled"] is False
    assert resolved({"fp16": {"enabled": False}})["fp16"]["enabled"] is False


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, ["is 8", "micro_batch = 4"]),
        ({"gradient_accumulation_steps": 1}, ["is 1", "accumulation = 3"]),
        ({"train_batch_size": 12}, ["is 12", "micro_batch x accumulation x 2 ranks = 24"]),
        ({"gradient_clipping": 1.0}, ["is 1.0", "gradient_clipping = 0.5"]),
        ({"bf16": {"enabled": True}}, ['"bf16.enabled" is true', "fp32", "--precision"]),
        ({"fp16": {"enabled": True}}, ["fp16 overflows in T5"]),
        ({"zero_optimization": {"stage": 4}}, ["ZeRO stage 4 does not exist"]),
        ({"zero_optimization": 2}, ['"zero_optimization" is 2, but must be a JSON object']),
        ({"bf16": True}, ['"bf16" is true']),
        ({"fp16": None}, ['"fp16" is null']),
        ({"scheduler": {"type": "WarmupLR"}}, ['"scheduler" contradicts', "schedule = step"]),
        ({"optimizer": {"params": {"lr": "auto"}}}, ['"auto" is not known for optimizer.params.lr']),
    ],
)
def test_contradictions(content: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolved(content)
    assert str(caught.value).startswith("ds.json: ")
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{'stage': 2}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_files_that_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_deepspeed_file(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such DeepSpeed file.*ds_configs"):
        read_deepspeed_file(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_deepspeed_file(tmp_path)
