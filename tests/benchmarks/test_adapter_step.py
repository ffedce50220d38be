"""The benchmark of the adapted layer runs, counts right, and overwrites nothing."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.measure import kept_bytes, rotated
from tests.helpers.launch import REPOSITORY
from tests.helpers.results import read_results


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    line = [sys.executable, str(REPOSITORY / "benchmarks/adapter_step.py"), "--quick", "--device", "cpu"]
    line += ["--threads", "1", "--check", "--output", str(tmp_path / "results.json")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert "C-LoRAE, dropout 0.1, bytes by plain" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    bars = [bar for found in results["summary"].values() for bar in found.values()]
    assert done.returncode == (0 if all(bar["met"] for bar in bars) else 1), done.stderr
    about = results["about"]
    assert (about["tokens"], about["repeats"], about["threads"]) == (128, 3, 1)
    assert [row["dropout"] for row in results["rows"]] == [0.0, 0.1]
    assert results["about"]["versions"].keys() == {"torch", "transformers", "peft"}
    for row in results["rows"]:
        tokens = 128
        assert row["rounds"] == 3
        kept, x = row["kept_bytes"], 4 * tokens * row["d_in"]
        assert kept["frozen"] == 0
        lora_r = row["trained_parameters"]["lora"] // (row["d_in"] + row["d_out"])
        # PEFT's LoRA keeps x and A x; under dropout on a CPU the dropped x and a mask of floats
        assert kept["lora"] == x * (2 if row["dropout"] else 1) + 4 * tokens * lora_r
        assert abs(row["trained_parameters"]["lora"] / row["trained_parameters"]["clorae"] - 1) < 0.02
        assert x < kept["clorae"] < kept["plain"]
        assert set(row["milliseconds"]) == {"frozen", "lora", "clorae", "plain", "moslora", "loramoe"}
    again = subprocess.run(line, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "not overwritten" in again.stderr


def test_the_figures_of_the_page_are_those_of_the_results() -> None:
    page = (REPOSITORY / "benchmarks/README.md").read_text(encoding="utf-8")
    content = read_results("adapter_step-cpu-2026-11-30")
    for name in ("time by lora", "bytes by lora", "bytes by plain", "time by frozen, llava-7b"):
        found = [content["summary"][dropout][name] for dropout in ("0.0", "0.1")]
        cells = [f"{one['median']:.3f}" + (f" ({one['bar']:.2f})" if one["bar"] else "") for one in found]
        assert f" | {' | '.join(cells)} |" in page
        assert all(one["met"] in (True, None) for one in found)
    shapes = sorted(row["time_by_lora"]["clorae"] for row in content["rows"])
    assert f"Single shapes take {shapes[0]:.2f} to {shapes[-1]:.2f} of LoRA's time" in page


def test_every_step_follows_every_other_equally_often() -> None:
    names = list("abcdef")
    orders = [rotated(names, number) for number in range(len(names))]
    assert all(sorted(order) == names for order in orders)
    followed = Counter(pair for order in orders for pair in pairwise(order))
    assert len(followed) == 30
    assert set(followed.values()) == {1}


@pytest.mark.integration
def test_counting_what_is_kept_keeps_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(31))
    with kept_bytes(torch.nn.Module()) as count:
        output = torch.exp(weight)  # whose node keeps its own output
        assert count() == 4 * 31
    del output, count
    gc.collect()
    assert not [item for item in gc.get_objects() if type(item) is torch.Tensor and item.shape == (31,)]


def test_counting_what_is_kept_leaves_backward_as_it_is() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    with kept_bytes(torch.nn.Module()):
        torch.exp(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(3).exp())
