"""Bad input stops a run before any training, with a message that says what to do and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae import doctor
from lvlm_clorae.data.shards import DatasetSpec, ShardWriter
from lvlm_clorae.errors import UserError
from lvlm_clorae.training import checks
from lvlm_clorae.training.config import TrainConfig, load_config
from lvlm_clorae.training.main import main

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
    return ["--shards", str(toy), "--deepspeed", str(deepspeed), "--output", str(tmp_path / "run")]


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has everything, so that no heavy library is imported."""
    monkeypatch.setattr(checks, "check_machine", lambda: None)
    monkeypatch.setattr(checks, "check_precision", lambda config: False)


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
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


def test_a_sound_run_passes_on_this_machine(argv: list[str]) -> None:
    reader, content = checks.check_run(load_config(argv))
    assert list(reader.index.datasets) == ["toy"]
    assert content["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((f"--{name}", "0") for name in ("rank", "expert-rank", "alpha", "micro-batch", "accumulation", "epochs")),
        *((f"--{name}", "0") for name in ("max-steps", "learning-rate", "step-epochs", "eval-batch", "gamma")),
        *((f"--{name}", "0") for name in ("evaluate-every", "checkpoint-every", "keep-checkpoints", "log-every")),
        *((f"--{name}", "0") for name in ("max-length", "max-answer-length")),
        *((f"--{name}", "-1") for name in ("beta", "weight-decay", "gradient-clipping", "seed", "workers", "rank")),
        *((f"--{name}", "nan") for name in ("beta", "gamma", "margin", "learning-rate", "dropout", "warmup")),
        *((f"--{name}", "inf") for name in ("beta", "gamma", "margin", "learning-rate", "alpha")),
        *((f"--{name}", "1") for name in ("dropout", "warmup", "ema", "margin")),
        *((f"--{name}", "-0.1") for name in ("dropout", "warmup", "ema")),
        ("--seed", str(1 << 64)),
    ],
)
def test_values_out_of_range(flag: str, value: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, [*argv, f"{flag}={value}"])
    name = flag[2:].replace("-", "_")
    assert error.startswith(f"error: {name} = ")
    assert f"Set {flag} to " in error


@pytest.mark.parametrize(
    "flags",
    ["--dropout 0 --warmup 0 --ema 0", "--beta 0 --weight-decay 0 --gradient-clipping 0 --workers 0", "--margin 1.001"],
)
@pytest.mark.usefixtures("healthy")
def test_values_at_the_edge(flags: str, argv: list[str]) -> None:
    checks.check_run(load_config([*argv, *flags.split()]))


@pytest.mark.usefixtures("healthy")
def test_no_expert(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    off = ["--no-use-universal", "--no-use-experts"]
    assert "both off" in refused(capsys, [*argv, *off])
    checks.check_run(load_config([*argv, *off, "--adapter", "lora"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "clorea"], 'Did you mean "clorae"?'),
        (["--epocs", "3"], 'Did you mean "--epochs"?'),
        (["--model", "flan-t5-bas"], 'Did you mean "flan-t5-base"?'),
        (["--model", "/no/such/model"], "/no/such/model: no such model directory"),
        (["--shards", "/no/such/shards"], "lvlm-clorae shards build"),
        (["--deepspeed", "/no/such.json"], "no such DeepSpeed file"),
    ],
)
def test_unknown_names(flags: list[str], message: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, [*argv, *flags])


def test_unknown_keys_of_a_file(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.yaml").write_text("lerning_rate: 1\n")
    assert 'Did you mean "learning_rate"?' in refused(capsys, [*argv, "--config", str(tmp_path / "my.yaml")])


def test_names_that_a_model_may_have(tmp_path: Path) -> None:
    for name in ("demo", "google/flan-t5-base", str(tmp_path)):
        checks.check_model(name)


def test_the_demo_is_to_be_drawn(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "lvlm-clorae shards demo --output shards/demo" in refused(capsys, argv[2:])


def test_an_empty_directory(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no index.json in it" in refused(capsys, [*argv, "--shards", str(tmp_path)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "m n r"}, 'dataset "toy" has the task "m n r", which is no plain name.'),
        ({"task": "own", "subtasks": ["enti"], "labels": {"enti": ["a"]}}, 'the sub-task "enti", unknown in own.'),
        (
            {"subtasks": ["entities"], "labels": {"entities": ["person"]}},
            'the sub-task "entities", unknown in mner. Did you mean "entity"?',
        ),
        ({"splits": {}}, '"splits" must be an object with at least one split'),
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
    assert checks.check_shards(load_config([*argv, "--shards", str(shards)])).index.units("train") == [
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
    assert "x 1 ranks = 8" in refused(capsys, [*argv, "--micro-batch", "8"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    checks.check_run(load_config([*argv, "--micro-batch", "8"]))


def test_a_foreign_output_directory(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "holds no run. Nothing is overwritten" in refused(capsys, argv)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_machine_that_lacks_something_is_told_in_the_doctors_words(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_ranks_on_cpu", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    error = refused(capsys, argv)
    lacking = doctor.lacking_for_training(doctor.examine(quick=True))
    assert {finding.name for finding in lacking} >= {"g++", "ninja"}
    assert all(str(finding) in error for finding in lacking)
    assert "apt-get install g++" in error


def test_bf16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(checks.UserError, match="Set --precision fp32"):
        checks.check_precision(TrainConfig(precision="bf16"))
    assert checks.check_precision(TrainConfig(precision="fp32")) is False


def test_only_the_first_rank_speaks(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main([*argv, "--rank", "0"]) == 2
    assert capsys.readouterr().err == ""


def test_the_exit_code_of_a_process() -> None:
    argv = [sys.executable, "train.py", "--micro-batch", "0"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: micro_batch = 0 is out of range: a micro-step needs a sample. Set --micro-batch to 1 or more.\n"
    )


def test_a_block_that_the_ranks_cannot_share_is_named_with_what_would_do(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"block = 12 is no multiple of micro_batch x ranks = 4 x 2.*a multiple of 8"):
        checks.check_run(load_config([*argv, "--micro-batch", "4", "--block", "12"]))
    checks.check_block(load_config([*argv, "--micro-batch", "4", "--block", "16"]), 2)


def zero3(directory: Path) -> str:
    path = directory / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return str(path)


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("flag", ["--load-in-8bit", "--load-in-4bit"])
def test_a_quantised_base_under_zero_3_is_refused_with_two_ways_out(
    flag: str, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_base", lambda config: pytest.fail("something of the base was looked at"))
    message = refused(capsys, [*argv, flag, "--deepspeed", zero3(tmp_path)])
    assert "keeps the quantised weights whole on every rank" in message
    assert f"keep {flag} with a ZeRO-2 file" in message
    assert f"leave {flag} out" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("healthy")
def test_a_quantised_base_has_one_kind_and_is_frozen(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Choose one" in refused(capsys, [*argv, "--load-in-8bit", "--load-in-4bit"])
    assert "nothing to train" in refused(capsys, [*argv, "--load-in-4bit", "--adapter", "full"])


def test_quantised_is_fine_under_zero_2_and_without_training(tmp_path: Path) -> None:
    eight = TrainConfig(load_in_8bit=True)
    checks.check_quantised(eight, {"zero_optimization": {"stage": 2}})
    checks.check_quantised(eight, {})
    checks.check_quantised(TrainConfig(load_in_8bit=True, adapter="none"), {"zero_optimization": {"stage": 3}})
    checks.check_quantised(TrainConfig(), {"zero_optimization": {"stage": 3}})


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fusion", "gated"], "fusion = gated is for T5"),
        (["--vision", "ViT-B-32:"], "demo has one of its own"),
        (["--template", "{image}{prompt}{answer}"], "takes no prompt template"),
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
