"""README's and docs' commands are what works: blocks marked for CI are run by .ci/run, the others here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest

from lvlm_clorae.cli import main as cli
from lvlm_clorae.models.build import split_tower
from lvlm_clorae.tasks import check_sample
from lvlm_clorae.training.checks import check_quantised
from lvlm_clorae.training.config import load_config
from lvlm_clorae.training.deepspeed_config import read_deepspeed_file
from tests.launch import REPOSITORY
from tests.published import write_invented

PAGES = [REPOSITORY / "README.md", *REPOSITORY.glob("*/README.md"), *(REPOSITORY / "docs").glob("*.md")]
ELSEWHERE = [
    REPOSITORY / name
    for name in (
        "docs/cost.md",
        "docs/models.md",
        "docs/real_text.md",
        "docs/routing.md",
        "docs/scaling.md",
        "docs/testbed.md",
        "docs/training.md",
        "docs/sweeps.md",
        "docs/multi_node.md",
        "docs/reproduce.md",
        "slurm/README.md",
    )
]
"""Whose commands the next tests run, or those of recipes, analysis, benchmarks, training, sweep and cluster."""
BLOCK = re.compile(r"(?:<!-- ci: (?P<mark>\w+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)


def blocks(path: Path, kind: str) -> list[tuple[str | None, str]]:
    """(CI mark or None, text) of the page's code blocks of one language."""
    found = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [(match["mark"], match["text"]) for match in found if match["kind"] == kind]


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_ci_runs_each_marked_block_of_readme() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    marks = [mark for mark, _ in blocks(REPOSITORY / "README.md", "bash") if mark]
    assert marks == ["train", "predict", "evaluate", "test"]
    run = re.findall(r"readme (\w+)|for name in ([\w ]+);", script)
    assert {word for pair in run for part in pair for word in part.split()} >= set(marks)


def test_the_two_commands_are_what_they_are() -> None:
    texts = dict(blocks(REPOSITORY / "README.md", "bash"))
    assert texts["train"].strip() == "pip install -e . && deepspeed train.py --deepspeed ds_configs/zero2.json"
    assert texts["test"].strip() == 'pip install -e ".[test]" && pytest -n 2 --dist loadfile'


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Datasets in their publishers' formats where README has /data, each of a few invented records."""
    data = write_invented(tmp_path / "data")
    (data / "twitter2015_images").mkdir()
    return data


def test_the_commands_for_your_data(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmarked = [text for mark, text in blocks(REPOSITORY / "README.md", "bash") if mark is None]
    lines = [line for text in unmarked for line in commands(text)]
    monkeypatch.chdir(tmp_path)
    ran, trained = [], []
    for line in lines:
        words = [word.replace("/data/", f"{published}/") for word in shlex.split(line)]
        if "m2e2" in words:  # its formats are exercised in tests/data; here the words must parse
            words = [*words, "--help"]
            with pytest.raises(SystemExit, match="0"):
                cli(words[1:])
        elif words[0] == "lvlm-clorae":
            assert cli(words[1:]) == 0, line
        else:
            assert words[:2] == ["deepspeed", "train.py"]
            trained.append(load_config(words[2:]))
        ran.append(words[0])
    assert ran == ["lvlm-clorae"] * 4 + ["deepspeed"] * 2 + ["lvlm-clorae"] + ["deepspeed"] * 2
    assert [config.model for config in trained] == ["flan-t5-base", "llava-1.5-7b", "demo", "demo"]
    assert [config.adapter for config in trained] == ["clorae", "clorae", "loramoe", "clorae"]
    assert (trained[3].use_gate, trained[3].beta) == (False, 0)


def test_commands_of_the_other_pages(tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(REPOSITORY / "shards")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for page in PAGES[1:]:
        if page in ELSEWHERE:
            continue
        for _, text in blocks(page, "bash"):
            if page != REPOSITORY / "shards" / "README.md":
                raise AssertionError(f"{page}: no test runs this block:\n{text}")
            done = subprocess.run(["bash", "-euc", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            if "--dataset jsonl" in text:
                assert "reviews: 2 train, 1 test" in done.stdout
                assert done.stdout.endswith("sound\n")
            elif "shards verify" in text:
                assert "demo_events_test_00000.json" in done.stdout
                assert "sound" in done.stdout
            elif "shards inspect" in text:
                assert "demo_events: argument roles" in done.stdout
                assert '"key": "demo_events_test_00003"' in done.stdout
                assert (tmp_path / "sample.png").read_bytes().startswith(b"\x89PNG")
            else:
                raise AssertionError(f"{page}: nothing is expected of this block:\n{text}")


def test_the_commands_of_the_models_page(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for _, text in blocks(REPOSITORY / "docs" / "models.md", "bash") for line in commands(text)]
    trained = []
    for words in map(shlex.split, lines):
        if words[0] == "lvlm-clorae":
            assert cli(words[1:]) == 0
            assert "language model" in capsys.readouterr().out
        else:
            assert words[:2] == ["deepspeed", "train.py"]
            config = load_config(words[2:])
            check_quantised(config, read_deepspeed_file(REPOSITORY / config.deepspeed))
            trained.append(config)
    assert [config.model for config in trained] == ["flan-t5-base", "llava-1.5-7b", "Qwen/Qwen2.5-VL-7B-Instruct"]
    name, tag = split_tower(str(trained[0].vision))
    assert open_clip.get_pretrained_cfg(name, str(tag)), "the tower of the example exists"


def test_the_commands_of_the_scaling_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    lines = [line for _, text in blocks(REPOSITORY / "docs" / "scaling.md", "bash") for line in commands(text)]
    printed = []
    for words in map(shlex.split, lines):
        assert words[:2] == ["lvlm-clorae", "cost"]
        assert cli(words[1:]) == 0
        printed.append(capsys.readouterr().out)
    assert "a rank without activations, 8 ranks, ZeRO-3" in printed[0]
    assert json.loads(printed[1])["scaling"]["micro_batch"] == 8


def test_the_commands_of_the_cost_page(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for _, text in blocks(REPOSITORY / "docs" / "cost.md", "bash") for line in commands(text)]
    printed = []
    for words in map(shlex.split, lines):
        assert words[:2] == ["lvlm-clorae", "cost"]
        assert cli(words[1:]) == 0
        printed.append(capsys.readouterr().out)
    assert "flan-t5-large, rank 64, 4 samples a micro-batch" in printed[0]
    assert set(json.loads(printed[1])) >= {"full", "LoRA", "MoSLoRA", "LoRAMoE", "C-LoRAE", "no gate", "no MIM"}


def test_json_blocks_are_samples() -> None:
    texts = [text for page in PAGES for _, text in blocks(page, "json")]
    assert texts
    for text in texts:
        assert check_sample(json.loads(text)) == []


def test_the_stream_of_the_data_page(monkeypatch: pytest.MonkeyPatch) -> None:
    [(_, text)] = blocks(REPOSITORY / "docs" / "data.md", "python")
    monkeypatch.chdir(REPOSITORY)
    found: dict[str, Any] = {}
    exec(compile(text, "docs/data.md", "exec"), found)
    assert (found["stream"].epoch, found["stream"].done) == (1, 0)
    assert len(found["batch"].keys) == 8


def test_python_blocks_compile() -> None:
    for page in PAGES:
        for _, text in blocks(page, "python"):
            compile(text, str(page), "exec")


def test_the_python_of_the_checkpoint_page_runs(tmp_path: Path) -> None:
    ((_, text),) = blocks(REPOSITORY / "docs/checkpoint.md", "python")
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "{'universal': 768" in done.stdout
    assert (tmp_path / "adapter-with-vqa" / "adapter_model.safetensors").is_file()
