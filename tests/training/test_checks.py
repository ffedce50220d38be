"""Checks of a run before any weights are loaded: exit code 2 and a message that names the mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, T5Config

from lvlm_clorae import doctor
from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import DatasetSpec, load_index
from lvlm_clorae.data.storage import open_storages
from lvlm_clorae.data.writer import ShardWriter
from lvlm_clorae.errors import UserError
from lvlm_clorae.training import checks
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import load_config
from lvlm_clorae.training.main import main
from tests.helpers.shards import SPEC, write_toy

REPOSITORY = Path(__file__).parents[2]
SAMPLE = {
    "dataset": "toy",
    "task": "mner",
    "text": "Ann",
    "tokens": ["Ann"],
    "image": None,
    "objects": [],
    "entities": [],
}


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one dataset with one training sample and no test sample."""
    directory = tmp_path_factory.mktemp("toy")
    with ShardWriter(directory, DatasetSpec("toy", "mner", ("entity",), {"entity": ["person"]}, {})) as writer:
        writer.add("train", "0", SAMPLE)
    return directory


@pytest.fixture
def argv(toy: Path, tmp_path: Path) -> list[str]:
    """A command line with nothing wrong in it."""
    deepspeed = REPOSITORY / "ds_configs" / "zero2.json"
    return ["--shards", str(toy), "--deepspeed", str(deepspeed), "--output_dir", str(tmp_path / "run")]


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the checks that import heavy libraries."""
    monkeypatch.setattr(checks, "check_environment", lambda: None)
    monkeypatch.setattr(checks, "check_bf16", lambda config: False)


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run a job that fails with code 2 and return its message."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.out == ""
    return captured.err


def edit_index(directory: Path, **changes: Any) -> None:
    path = directory / "index.json"
    content = json.loads(path.read_text())
    content["datasets"]["toy"].update(changes)
    path.write_text(json.dumps(content))


def copy(toy: Path, target: Path) -> Path:
    target.mkdir()
    for path in toy.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_valid_run_passes(argv: list[str]) -> None:
    reader, content = checks.check_run(load_config(argv))
    assert list(reader.index.datasets) == ["toy"]
    assert content["zero_optimization"]["stage"] == 2


@pytest.mark.usefixtures("healthy")
def test_no_expert(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    off = ["--no-use-universal", "--no-use-experts"]
    assert "use_experts" in refused(capsys, [*argv, *off])
    checks.check_run(load_config([*argv, *off, "--adapter", "lora"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "flan-t5-bas"], 'Did you mean "flan-t5-base"?'),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--shards", "/no/such/shards"], "lvlm-clorae shards build"),
        (["--deepspeed", "/no/such.json"], "zero2, zero2_int8"),
    ],
)
def test_unknown_names(flags: list[str], message: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, [*argv, *flags])


def test_names_that_a_model_may_have(tmp_path: Path) -> None:
    for name in ("demo", "google/flan-t5-base", str(tmp_path)):
        checks.check_model(name)


def test_missing_demo_shards_name_the_command(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "lvlm-clorae shards demo --output_dir shards/demo" in refused(capsys, argv[2:])


def test_an_empty_directory(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "index.json" in refused(capsys, [*argv, "--shards", str(tmp_path)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "m n r"}, '"m n r"'),
        ({"task": "own", "subtasks": ["enti"], "labels": {"enti": ["a"]}}, 'unknown sub-task "enti"'),
        (
            {"subtasks": ["entities"], "labels": {"entities": ["person"]}},
            'unknown sub-task "entities". Did you mean "entity"?',
        ),
        ({"splits": {}}, '"toy", splits'),
    ],
)
def test_an_index_that_fits_no_task(
    change: dict[str, Any], message: str, argv: list[str], toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = copy(toy, tmp_path / "shards")
    edit_index(shards, **change)
    assert message in refused(capsys, [*argv, "--shards", str(shards)])


def test_an_index_of_a_task_of_ones_own(argv: list[str], toy: Path, tmp_path: Path) -> None:
    shards = copy(toy, tmp_path / "shards")
    edit_index(shards, task="aspects", subtasks=["entity", "relation"], labels={"entity": ["a"], "relation": ["b"]})
    assert list(checks.check_shards(load_config([*argv, "--shards", str(shards)])).index.dataset_tasks("train")) == [
        "toy/entity",
        "toy/relation",
    ]


def test_an_index_that_disagrees(
    argv: list[str], toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = copy(toy, tmp_path / "shards")
    (shard,) = shards.glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-512])
    assert "bytes where index.json says" in refused(capsys, [*argv, "--shards", str(shards)])
    shard.unlink()
    assert f"{shard}: the shard is missing" in refused(capsys, [*argv, "--shards", str(shards)])


@pytest.mark.usefixtures("healthy")
def test_nothing_to_train_on(argv: list[str], toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 'no dataset has a split "test"' in refused(capsys, [*argv, "--adapter", "none"])
    shards = copy(toy, tmp_path / "shards")
    edit_index(
        shards, splits={"test": json.loads((toy / "index.json").read_text())["datasets"]["toy"]["splits"]["train"]}
    )
    argv = [*argv, "--shards", str(shards)]
    assert 'no dataset has a split "train"' in refused(capsys, argv)
    checks.check_run(load_config([*argv, "--adapter", "none"]))


@pytest.mark.usefixtures("healthy")
def test_a_deepspeed_file_against_the_run(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    argv = [*argv, "--deepspeed", str(path)]
    path.write_text("{")
    assert "not valid JSON" in refused(capsys, argv)
    path.write_text('{"train_batch_size": 16, "zero_optimization": {"stage": 2}}')
    assert "x 1 = 8" in refused(capsys, [*argv, "--per_device_train_batch_size", "8"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    checks.check_run(load_config([*argv, "--per_device_train_batch_size", "8"]))


def test_a_foreign_output_directory(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert str(tmp_path / "run") in refused(capsys, argv)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_missing_dependencies_are_reported_as_by_the_doctor(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = doctor.Finding("c++", "not found", "missing", "apt-get install g++")
    monkeypatch.setattr(doctor, "examine", lambda quick: [missing, doctor.Finding("GPU", "none", "note")])
    error = refused(capsys, argv)
    assert str(missing) in error
    assert "GPU" not in error


def test_bf16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(checks.UserError, match="--bf16 false"):
        checks.check_bf16(TrainConfig(bf16=True))
    assert checks.check_bf16(TrainConfig(bf16=False)) is False


@pytest.mark.parametrize(
    ("config_class", "width", "amx", "expected"),
    [
        (LlamaConfig, 512, True, True),
        (T5Config, 768, True, True),
        (LlamaConfig, 256, True, False),
        (LlamaConfig, 512, False, False),
    ],
)
def test_bf16_auto_on_a_cpu(
    config_class: Any, width: int, amx: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in docs/training.md: with AMX, wide language models are faster in bf16 and the demo's in fp32."""
    config_class(hidden_size=width).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert checks.check_bf16(TrainConfig(model=str(tmp_path))) is expected
    assert checks.check_bf16(TrainConfig(model=str(tmp_path), bf16=not expected)) is not expected


def test_only_rank_0_prints_an_error_of_all_ranks(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main([*argv, "--lora_rank", "0"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.integration
def test_a_process_exits_with_code_2_and_one_line() -> None:
    argv = [sys.executable, "train.py", "--per_device_train_batch_size", "0"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: per_device_train_batch_size = 0: ")
    assert done.stderr.count("\n") == 1


def test_a_global_micro_batch_that_the_ranks_cannot_share(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ["--per_device_train_batch_size", "4", "--global_micro_batch"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"global_micro_batch = 12 .* multiple of 8"):
        checks.check_run(load_config([*argv, *batch, "12"]))
    checks.check_global_micro_batch(load_config([*argv, *batch, "16"]), 2)


def zero3(directory: Path) -> str:
    path = directory / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return str(path)


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("flag", ["--load_in_8bit", "--load_in_4bit"])
def test_a_quantized_base_under_zero_3_is_refused_with_two_fixes(
    flag: str, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_base", lambda config: pytest.fail("something of the base was looked at"))
    message = refused(capsys, [*argv, flag, "--deepspeed", zero3(tmp_path)])
    assert "ZeRO-3" in message
    assert "zero2" in message
    assert flag in message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("healthy")
def test_a_quantized_base_has_one_type_and_is_frozen(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "load_in_8bit and load_in_4bit" in refused(capsys, [*argv, "--load-in-8bit", "--load-in-4bit"])
    assert "--adapter full" in refused(capsys, [*argv, "--load-in-4bit", "--adapter", "full"])


def test_a_quantized_base_under_zero_2_or_without_training(tmp_path: Path) -> None:
    eight = TrainConfig(load_in_8bit=True)
    checks.check_quantized(eight, {"zero_optimization": {"stage": 2}})
    checks.check_quantized(eight, {})
    checks.check_quantized(TrainConfig(load_in_8bit=True, adapter="none"), {"zero_optimization": {"stage": 3}})
    checks.check_quantized(TrainConfig(), {"zero_optimization": {"stage": 3}})


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fusion", "gated"], "fusion = gated"),
        (["--vision", "ViT-B-32:"], "vision = ViT-B-32:"),
        (["--template", "{image}{prompt}{answer}"], "template = "),
        (["--model", "nobody/no-such-model"], "hf download nobody/no-such-model"),
    ],
)
def test_what_the_base_has_no_use_for_is_refused_before_it_is_loaded(
    flags: list[str],
    message: str,
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert message in refused(capsys, [*argv, *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("targets", [["foo"], ["q", "vv"], ["layer_norm"]])
def test_target_modules_without_a_match_are_refused_before_the_group_is_formed(
    targets: list[str],
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every rank finds it alone, so none waits for another."""
    from lvlm_clorae.training import distributed

    monkeypatch.setattr(distributed, "start", None)
    capsys.readouterr()  # DeepSpeed prints when it is imported
    message = refused(capsys, [*argv, "--target_modules", *targets])
    assert f'"{targets[-1]}"' in message
    assert "q, v, " in message
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "1")
    assert main([*argv, "--target_modules", *targets]) == 2
    assert capsys.readouterr().err == ""


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)


def dataset_of(*shards: Path | str, **where: Path) -> ShardDataset:
    return ShardDataset(*open_storages(f"{{{','.join(map(str, shards))}}}" if shards[1:] else str(shards[0]), **where))


@pytest.mark.integration
@pytest.mark.usefixtures("process_group")
def test_local_shards_with_other_bytes_are_named(tmp_path: Path) -> None:
    write_toy(tmp_path / "a")
    write_toy(tmp_path / "b", replace(SPEC, name="other"))
    assert checks.verify_shards(dataset_of(tmp_path / "a", tmp_path / "b")) == 4
    damaged = [tmp_path / "a" / "toy-test-000000.tar", tmp_path / "b" / "other-train-000000.tar"]
    for path in damaged:
        flip(path)
    with pytest.raises(UserError) as caught:
        checks.verify_shards(dataset_of(tmp_path / "a", tmp_path / "b"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("SHA-256") == 2
    assert all(str(path) in str(caught.value) for path in damaged)
    damaged[0].unlink()
    with pytest.raises(UserError, match=rf"{damaged[0]}: cannot be read \(No such file"):
        checks.verify_shards(ShardDataset(load_index(tmp_path / "a", check_files=False), tmp_path / "a"))


@pytest.mark.usefixtures("process_group")
def test_a_signal_ends_the_verification_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy(tmp_path)
    flip(tmp_path / "toy-train-000000.tar")
    monkeypatch.setattr("lvlm_clorae.training.preemption._stop_requested", True)
    checks.verify_shards(dataset_of(tmp_path))


@pytest.mark.usefixtures("process_group")
def test_remote_shards_are_left_to_the_cache(tmp_path: Path) -> None:
    write_toy(tmp_path / "shards")
    location = f"pipe:cat {tmp_path}/shards/{{}}"
    assert checks.verify_shards(dataset_of(location, cache_dir=tmp_path / "cache")) == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.integration
def test_prompts_without_room_for_the_labels_end_a_run_before_its_first_step(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lvlm_clorae.training import distributed

    try:
        assert main([*argv, "--max_source_length", "4"]) == 2
    finally:
        distributed.stop()
    assert "toy/entity: " in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.integration
def test_a_run_verifies_its_shards_if_asked(
    argv: list[str], toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lvlm_clorae.training import distributed

    shards = copy(toy, tmp_path / "shards")
    flip(shards / "toy-train-000000.tar")
    argv[1] = str(shards)
    try:
        assert main([*argv, "--verify_shards"]) == 2
    finally:
        distributed.stop()
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith(f"error: {shards / 'toy-train-000000.tar'}: ")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
