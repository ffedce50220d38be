"""The command line: exit codes, messages, start-up time and imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lvlm_clorae
from lvlm_clorae import cli
from lvlm_clorae.cli import COMMANDS, NESTED

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "deepspeed", "open_clip", "numpy", "PIL", "rich", "fsspec")


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run a command that fails with ``code`` and return its message."""
    assert cli.main(list(argv)) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def python(code: str, *, module: bool = False) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *(["-m", *code.split()] if module else ["-c", code])]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.integration
@pytest.mark.parametrize(("command", "seconds"), [("lvlm_clorae --help", 0.5), ("train --help", 2.0)])
def test_help_is_fast(command: str, seconds: float) -> None:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        done = python(command, module=True)
        times.append(time.perf_counter() - begin)
        assert done.returncode == 0
        assert "--help" in done.stdout
    assert min(times) < seconds


def test_a_command_of_a_sub_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for outer, commands in NESTED.items():
        for name in commands:
            assert f"lvlm-clorae {outer} {name}" in refused(capsys, name)
            with pytest.raises(SystemExit, match="0"):
                cli.main([outer, name, "--help"])


@pytest.mark.integration
def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = f"""
import sys
from lvlm_clorae.cli import COMMANDS, main
for argv in ([], *([name] for name in COMMANDS), ["shards", "build"], ["sweep", "expand"]):
    try:
        main([*argv, "--help"])
    except SystemExit as exit:
        assert exit.code == 0
print("imported", [name for name in {HEAVY} if name in sys.modules])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported []"


@pytest.mark.integration
@pytest.mark.parametrize(
    "start",
    [
        "import lvlm_clorae; from lvlm_clorae import Request, UserError, TrainConfig",
        "from lvlm_clorae.training.config_loading import load_config; load_config(['--num_train_epochs', '1'])",
        "import lvlm_clorae.training.main, lvlm_clorae.training.checks",
    ],
)
def test_start_imports_nothing_heavy(start: str) -> None:
    done = python(f"import sys; {start}; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lvlm-clorae {lvlm_clorae.__version__}\n"


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.integration
def test_error_of_a_process_has_no_traceback() -> None:
    done = python("lvlm_clorae shards verify /nowhere", module=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: /nowhere")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("shard verify x", '"shards"'),
        ("shards biuld", '"build"'),
        ("shards build --datset twitter15", "--dataset"),
        ("shards demo --outpt-dir=x", "--output_dir"),
        ("shards demo --output x", "--output_dir"),
        ("--verbos doctor", "--verbos"),
        ("doctor now", "now"),
        ("shards demo", "--output_dir"),
        ("shards demo --output-di x", "--output_dir"),
        ("shards build --dataset twiter15 --input x --output_dir y", '"twitter15"'),
        ("shards build --dataset nothing-like-it --input x --output_dir y", "funsd, jsonl, m2e2, mre_v1"),
        ("", "COMMAND"),
        ("evaluate --run x --batch 3", "--per_device_eval_batch_size"),
        ("evaluate --run x --split tset", '"test"'),
        ("compare x --units a/b", "--dataset_tasks"),
        ("cost --rank 8", "--lora_rank"),
        ("cost --lora_rank many", "lora_rank"),
        ("predict --run x --txt y", "--text"),
        ("predict --run x --foo", "lvlm-clorae predict --help"),
        ("evaluate --run x --trust", "lvlm-clorae evaluate --help"),
    ],
)
def test_mistakes_name_the_right_word(line: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(capsys, *line.split())


@pytest.mark.integration
def test_dashes_and_underscores_are_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, flag in enumerate(("--output-dir", "--output_dir")):
        assert cli.main(["shards", "demo", f"{flag}={tmp_path / str(number)}"]) == 0
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == sorted(
        path.name for path in (tmp_path / "1").iterdir()
    )


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lvlm_clorae.data.validation.verify", interrupt)
    assert cli.main(["shards", "verify", "x"]) == 130


def test_the_launchers_flag_before_the_command_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no/such/run" in refused(capsys, "--local_rank=1", "predict", "--run", "no/such/run", "--text", "a")


def test_train_runs_the_job_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(argv: list[str], prog: str) -> None:
        raise SystemExit(f"{prog}: {argv}")

    monkeypatch.setattr("lvlm_clorae.cli.train.entry", entry)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--lora_rank", "8"])
    assert caught.value.code == "lvlm-clorae train: ['--lora_rank', '8']"


def test_doctor_exits_with_2_if_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lvlm_clorae.doctor import Finding

    findings = [Finding("torch", "2.15"), Finding("sbatch", "not found", "note")]
    monkeypatch.setattr("lvlm_clorae.doctor.examine", lambda: findings)
    assert cli.main(["doctor"]) == 0
    findings.append(Finding("c++", "not found", "missing", "apt-get install g++"))
    assert cli.main(["doctor"]) == 2
    assert "apt-get install g++" in capsys.readouterr().out


@pytest.mark.integration
@pytest.mark.parametrize("model", ["flan-t5-xl", "llava-1.5-7b"])
def test_cost_of_a_large_base_takes_seconds_and_no_file(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """CPU time is limited, since other processes stretch the wall time."""
    before = time.process_time()
    assert cli.main(["cost", "--model", model, "--json"]) == 0
    assert time.process_time() - before < 30
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["language model", "projector", "vision tower", "adapter"]
    assert found["language model"]["parameters"] > 2.8e9
    assert found["language model"]["trained"] == found["vision tower"]["trained"] == 0
    assert found["adapter"]["trained"] == found["adapter"]["parameters"] > 1e7


@pytest.mark.integration
def test_cost_has_the_sizes_of_the_chosen_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    """The language model of LLaVA-1.5-7B is 13.0 GiB in bf16; its embedding and output head are not quantized."""
    sizes = {}
    for flags in ("", "--bf16 false", "--load_in_8bit", "--load_in_4bit"):
        line = ["cost", "--model", "llava-1.5-7b", *flags.split()]
        assert cli.main([*line, "--json"]) == 0
        sizes[flags] = json.loads(capsys.readouterr().out)["language model"]["bytes"]
        assert cli.main(line) == 0
        assert f"{sizes[flags] / 2**30:.2f} GiB" in capsys.readouterr().out
    assert sizes["--bf16 false"] == 2 * sizes[""]
    assert 0.515 < sizes["--load_in_8bit"] / sizes[""] < 0.525
    assert 0.29 < sizes["--load_in_4bit"] / sizes[""] < 0.31


def test_cost_shows_small_sizes_in_mib(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost"]) == 0
    sizes = [line.split("│")[-2].split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(sizes) == 5
    assert all(unit == "MiB" and float(number) > 0 for number, unit in sizes)


def test_cost_takes_the_settings_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", "--adapter", "lora", "--lora-rank", "8", "--target_modules", "q"]) == 0
    text = capsys.readouterr().out
    assert "demo with lora, rank 8" in text
    layers, width, inner = 12, 128, 128  # encoder, decoder and cross-attention of four blocks
    assert f"{layers * 8 * (width + inner):,}" in text


@pytest.mark.integration
def test_a_closed_pipe_is_no_error() -> None:
    line = f"{sys.executable} -m lvlm_clorae shards inspect shards/demo --json | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout in ("{141\n", "{0\n")  # 0 if all of it fits into the pipe


@pytest.mark.integration
@pytest.mark.parametrize("command", ["shards verify café", "sweep status café.yaml"])
def test_an_ascii_terminal(command: str) -> None:
    line = [sys.executable, "-m", "lvlm_clorae", *command.split()]
    settings = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, cwd=REPOSITORY, env=settings, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "caf\\xe9" in done.stderr


@pytest.mark.parametrize(
    "line", ["predict --run {} --text a", "evaluate --run {}", "shards build --dataset jsonl --input {} --output_dir y"]
)
def test_a_name_that_is_too_long_is_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "too long" in refused(capsys, *line.format("A" * 400).split())
