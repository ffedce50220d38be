"""`lvlm-clorae cost --adapter all` and the tables of docs/cost.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_clorae import cli
from lvlm_clorae.analysis.comparison import PAPER, cells, figures, systems
from lvlm_clorae.analysis.cost_page import tables
from lvlm_clorae.analysis.flops import Base, Cost
from lvlm_clorae.analysis.parameters import count_parameters
from lvlm_clorae.analysis.scaling_page import fill
from lvlm_clorae.training.config import make_config
from tests.launch import REPOSITORY
from tests.models.tiny_image_text import save_qwen

TASKS = ["mner", "mre", "mee"]
PAGE = REPOSITORY / "docs/cost.md"
SMALL = {"max_length": 24, "max_answer_length": 8, "target_modules": ["q", "v"]}
ARGV = "cost --adapter all --max-length 24 --max-answer-length 8 --target-modules q v".split()


def test_figures_of_every_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGV, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = make_config(SMALL)
    assert list(found) == list(systems(config))
    base, named = Base(config), systems(config)
    costs = {name: base.count(named[name], TASKS) for name in ("LoRA", "C-LoRAE")}
    for name, row in figures(costs, config).items():
        trained = sum(part.trained for part in count_parameters(named[name], TASKS).values())
        assert found[name] == row
        assert (row["trained"], row["gradient_bytes"], row["optimizer_bytes"]) == (trained, 2 * trained, 12 * trained)
        assert row["forward_flops"] == costs[name].forward / 16  # the demo's micro-batch
        assert row["paper_trained_millions"] is None
    assert found["LoRA"]["forward_by_lora"] == found["LoRA"]["both_by_lora"] == 1
    assert found["no MIM"]["both_flops"] < found["C-LoRAE"]["both_flops"]
    exact = figures(costs, make_config({"precision": "fp32"}))
    assert exact["LoRA"]["gradient_bytes"] == 2 * found["LoRA"]["gradient_bytes"]


def test_the_table_has_the_papers_columns_where_it_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(ARGV) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("demo, rank 16", "C-LoRAE", "only task experts", "optimizer, GiB"))
    assert "paper" not in text
    config = make_config({"model": "flan-t5-base"})
    assert (config.model, config.rank) in PAPER
    costs = dict.fromkeys(systems(config), Cost(1, 2, 3))
    head, *rows = cells(figures(costs, config))
    assert head.count("paper") == 3
    by_name = {row[0]: row for row in rows}
    assert by_name["C-LoRAE"][2:7:2] == ("30.4", "23.2", "1.055")
    assert by_name["no gate"][2:7:2] == ("", "", "")


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_qwen(tmp_path)
    capsys.readouterr()
    refused = {
        ("--model", str(tmp_path)): "operations are counted of a T5 or a causal language model with our vision tower",
        ("--world-size", "8"): "--adapter all compares systems on one GPU",
        ("--adapter", "al"): '"al" is not a choice',
    }
    for more, message in refused.items():
        assert cli.main(["cost", "--adapter", "all", *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error


@pytest.mark.slow
def test_the_page_has_the_tables_that_are_counted() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == 5
    assert fill(page, tables()) == page, "run python -m lvlm_clorae.analysis.cost_page docs/cost.md"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flan-t5-xl", "llava-1.5-7b"])
def test_a_large_base_takes_seconds_and_no_file(model: str) -> None:
    """On a machine that does nothing else about 12 s, of which imports take half."""
    argv = [sys.executable, "-m", "lvlm_clorae.cli", "cost", "--model", model, "--adapter", "all", "--json"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=90)
    found = json.loads(done.stdout)
    assert 1 < found["C-LoRAE"]["both_by_lora"] < 1.01
