"""Comparison of all methods: figures of every system and ablation, beside the paper's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_clorae.analysis.cost import describe
from lvlm_clorae.models.parts import part_sizes
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.launch import REPOSITORY
from tests.helpers.tiny_image_text import save_qwen
from tools import methods
from tools.flops import Base, Cost
from tools.methods import cells, figures, systems

TASKS = ["mner", "mre", "mee"]
SMALL = {"max_source_length": 24, "max_target_length": 8, "target_modules": ["q", "v"]}
ARGV = "--max_source_length 24 --max_target_length 8 --target-modules q v".split()


@pytest.mark.slow
def test_figures_of_every_system(capsys: pytest.CaptureFixture[str]) -> None:
    methods.main([*ARGV, "--json"])
    found = json.loads(capsys.readouterr().out)
    config = make_config(SMALL)
    assert list(found) == list(systems(config))
    base, named = Base(config), systems(config)
    costs = {name: base.count(named[name], TASKS) for name in ("LoRA", "C-LoRAE")}
    for name, row in figures(costs, config).items():
        trained = sum(part.trained for part in part_sizes(describe(named[name], TASKS)).values())
        assert found[name] == row
        assert (row["trained"], row["gradient_bytes"], row["optimizer_bytes"]) == (trained, 2 * trained, 12 * trained)
        assert row["forward_flops"] == costs[name].forward / 16  # the demo's micro-batch
        assert row["paper_trained_millions"] is None
    assert found["LoRA"]["forward_by_lora"] == found["LoRA"]["both_by_lora"] == 1
    assert found["no MIM"]["both_flops"] < found["C-LoRAE"]["both_flops"]
    fp32 = figures(costs, make_config({"bf16": False}))
    assert fp32["LoRA"]["gradient_bytes"] == 2 * found["LoRA"]["gradient_bytes"]


def test_the_papers_columns_are_shown_only_if_it_has_the_base_and_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "count_systems", lambda config, tasks: dict.fromkeys(systems(config), Cost(1, 2, 3)))
    methods.main(ARGV)
    text = capsys.readouterr().out
    assert all(name in text for name in ("demo, rank 16", "C-LoRAE", "only task experts", "optimizer, GiB"))
    assert "paper" not in text
    for rank, columns in ((128, 3), (64, 0)):
        config = make_config({"model": "flan-t5-base", "lora_rank": rank})
        head, *rows = cells(figures(dict.fromkeys(systems(config), Cost(1, 2, 3)), config))
        assert head.count("paper") == columns
        by_name = {row[0]: row for row in rows}
        if columns:
            assert by_name["C-LoRAE"][2:7:2] == ("30.4", "23.2", "1.055")
            assert by_name["no gate"][2:7:2] == ("", "", "")


@pytest.mark.parametrize(
    ("flags", "part"),
    [(["--model", "QWEN"], "QWEN"), (["--adapter", "al"], "adapter = al")],
)
def test_mistakes_end_with_code_2(
    flags: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_qwen(tmp_path)
    capsys.readouterr()
    given = [flag.replace("QWEN", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit, match="2"):
        methods.main(given)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert part.replace("QWEN", str(tmp_path)) in error


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flan-t5-xl", "llava-1.5-7b"])
def test_a_large_base_takes_seconds_and_no_file(model: str) -> None:
    """About 12 s on an idle machine, half of it for imports."""
    argv = [sys.executable, "-m", "tools.methods", "--model", model, "--json"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=90)
    found = json.loads(done.stdout)
    assert 1 < found["C-LoRAE"]["both_by_lora"] < 1.01
