"""The DeepSpeed file: "auto" is filled in, contradictions are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import deepspeed.runtime.config
import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import load_config
from lvlm_clorae.training.deepspeed_config import check_sections, find_deepspeed_file, read_deepspeed_file, resolve

CONFIG = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=3, max_grad_norm=0.5)
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
    assert [path.stem for path in SHIPPED] == ["zero2", "zero2_int8", "zero2_offload", "zero3", "zero3_offload"]


def test_an_empty_file_is_filled() -> None:
    settings = resolved({})
    assert settings["train_batch_size"] == 24
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["bf16"] == {"enabled": False}


def test_equal_values_may_be_written_out() -> None:
    content = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}
    assert resolved(content, bf16=True)["train_batch_size"] == 24


def test_a_file_for_transformers_trainer() -> None:
    """As its documentation has it, but for the scheduler."""
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "overlap_comm": True}
    parameters = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    settings = resolved({"zero_optimization": zero, "optimizer": {"type": "AdamW", "params": parameters}})
    assert settings["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert settings["optimizer"]["params"] == {"lr": CONFIG.learning_rate, "weight_decay": CONFIG.weight_decay}


def test_settings_that_a_file_brings(tmp_path: Path) -> None:
    assert "lvlm_clorae" not in resolved({"lvlm_clorae": {"load_in_8bit": True}})
    int8 = str(next(path for path in SHIPPED if path.stem == "zero2_int8"))
    assert load_config(["--deepspeed", int8]).load_in_8bit
    assert not load_config(["--deepspeed", int8, "--no-load-in-8bit"]).load_in_8bit
    (tmp_path / "run.yaml").write_text(f"deepspeed: {int8}")
    assert load_config(["--config", str(tmp_path / "run.yaml")]).load_in_8bit
    (tmp_path / "ds.json").write_text('{"lvlm_clorae": {"lora-rank": 3}}')
    assert load_config(["--deepspeed", str(tmp_path / "ds.json")]).lora_rank == 3


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ('{"load_in_8bits": true}', '"load_in_8bit"'),
        ('{"lr": 1}', "learning_rate"),
        ('{"rank": 1}', "lora_rank"),
        ('{"lora_rank": 0}', "lora_rank = 0"),
        ('{"use_gate": "maybe"}', "true, false"),
        ('{"lora-rank": 3, "lora_rank": 3}', '"lora_rank"'),
        ('{"lora_rank": 3, "lora_rank": 4}', '"lora_rank"'),
        ('{"deepspeed": "zero3"}', '"deepspeed"'),
        ('["load_in_8bit"]', "object"),
        ('"int8"', "object"),
        ("null", "object"),
        ('{"beta": NaN}', "NaN"),
        ('{"beta": 1e999}', "1e999"),
        ("[" * 101 + "]" * 101, "nested"),
        ("[" * 100_000, "nested"),
    ],
)
def test_a_section_of_settings_is_as_strict_as_a_yaml_file(section: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(f'{{"lvlm_clorae": {section}}}')
    with pytest.raises(UserError) as caught:
        load_config(["--deepspeed", str(path), "--lora_rank", "8"])
    assert str(caught.value).startswith(f"{path}: ")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"zero_optimisation": {"stage": 3}}, '"zero_optimization"'),
        ({"gradient_clipin": 1}, '"gradient_clipping"'),
        ({"text": "a b"}, '"text" is no setting'),
    ],
)
def test_a_name_that_deepspeed_would_ignore_is_an_error(content: dict[str, Any], part: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=part):
        read_deepspeed_file(path)


def test_names_that_deepspeed_reads_are_accepted(tmp_path: Path) -> None:
    """Its documentation has no complete list: these are the top-level names in the functions that read the file."""
    source = Path(deepspeed.runtime.config.__file__).read_text()
    named = set(re.findall(r"param_dict, ([A-Z_0-9]+), ", source)) | set(
        re.findall(r"param_dict\[([A-Z_0-9]+)\]", source)
    )
    found = {getattr(deepspeed.runtime.config, name) for name in named if hasattr(deepspeed.runtime.config, name)}
    assert {"train_batch_size", "steps_per_print", "gradient_clipping"} <= found
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(dict.fromkeys(found, 1)))
    read_deepspeed_file(path)


@pytest.mark.parametrize(
    ("zero", "part"),
    [({"stag": 2}, "zero_optimization.stag"), ({"reduce_bucket_size": "5e7x"}, "reduce_bucket_size")],
)
def test_a_section_that_deepspeed_refuses_is_an_error(zero: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        check_sections(resolved({"zero_optimization": zero}), "ds.json")
    for path in SHIPPED:
        check_sections(resolved(read_deepspeed_file(path)), path.name)


def test_fp16_left_to_us_is_off() -> None:
    assert resolved({"fp16": {"enabled": "auto"}})["fp16"]["enabled"] is False
    assert resolved({"fp16": {"enabled": False}})["fp16"]["enabled"] is False


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, ["is 8", "per_device_train_batch_size = 4"]),
        ({"gradient_accumulation_steps": 1}, ["is 1", "gradient_accumulation_steps = 3"]),
        ({"train_batch_size": 12}, ["is 12", "x 2 = 24"]),
        ({"gradient_clipping": 1.0}, ["is 1.0", "max_grad_norm = 0.5"]),
        ({"bf16": {"enabled": True}}, ['"bf16.enabled" is true', "fp32", "--bf16"]),
        ({"fp16": {"enabled": True}}, ["fp16 overflows in T5"]),
        ({"zero_optimization": {"stage": 4}}, ["ZeRO stage 4 does not exist"]),
        ({"zero_optimization": {"stage": 0}}, ["ZeRO stage 0", "stage 1 computes the same"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["nvme is not supported"]),
        ({"zero_optimization": 2}, ['"zero_optimization" is 2, but must be a JSON object']),
        ({"bf16": True}, ['"bf16" is true']),
        ({"fp16": None}, ['"fp16" is null']),
        ({"scheduler": {"type": "WarmupLR"}}, ['"scheduler" contradicts', "lr_scheduler_type = step"]),
        ({"optimizer": {"type": "SGD"}}, ['"optimizer.type" is "SGD"', "AdamW"]),
        ({"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": False}, ['"optimizer.type" is "SGD"']),
        ({"optimizer": {"params": None}}, ['"optimizer.params" is null']),
        ({"optimizer": {"params": {"lr": 5.0}}}, ['"optimizer.params.lr" is 5.0', "learning_rate = "]),
        ({"optimizer": {"params": {"weight_decay": 5.0}}}, ["weight_decay = "]),
        ({"optimizer": {"params": {"amsgrad": "auto"}}}, ['"auto" is not known for optimizer.params.amsgrad']),
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
        (b'{"bf16": {"enabled": true, "enabled": false}}', '"enabled"'),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_files_that_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_deepspeed_file(path)
    assert str(path) in str(caught.value)


def test_packaged_files_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("zero2", "ds_configs/zero2.json"):
        assert read_deepspeed_file(find_deepspeed_file(name))["zero_optimization"]["stage"] == 2
    for name in ("zero9", "mine/zero2.json", "ds_configs/zero9.json"):
        assert find_deepspeed_file(name) == Path(name)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero2.json").touch()
    assert find_deepspeed_file("ds_configs/zero2.json") == Path("ds_configs/zero2.json"), (
        "a file there takes precedence"
    )
    assert find_deepspeed_file("zero2").is_file()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="zero2_int8"):
        read_deepspeed_file(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_deepspeed_file(tmp_path)
