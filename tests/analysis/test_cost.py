"""``lvlm-clorae cost``: parameters, and memory of a GPU with ``--world-size``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lvlm_clorae import cli


def cost(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["cost", *words]) == 0
    return capsys.readouterr().out


def test_memory_on_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.loads(cost(capsys, "--json"))
    found = json.loads(cost(capsys, "--json", "--world-size", "8", "--zero-stage", "3"))
    estimated = found.pop("scaling")
    assert found == plain
    assert (estimated["ranks"], estimated["zero"]["stage"]) == (8, 3)
    assert estimated["memory"]["gpu"]["moments"] > 0
    text = cost(capsys, "--world-size", "8")
    assert all(word in text for word in ("demo with clorae, rank 16", "8 ranks", "moments"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--zero-stage 2", "--world_size"),
        ("--deepspeed ds_configs/zero2.json", "--world_size"),
        ("--world-size 0", "--world_size"),
        ("--world-size 2 --zero-stage 0", "zero_stage"),
        ("--world-size 2 --gradient_accumulation_steps 0", "gradient_accumulation_steps"),
        ("--world-size 2 --deepspeed none.json", "none.json"),
        ("--world-size 2 --zero-stage 3 --load-in-8bit", "ZeRO-3"),
        ("--tasks mner mner", "distinct"),
        ("--use_universal false --use_experts false", "use_experts"),
        ("--load-in-8bit --load-in-4bit", "exclude each other"),
        ("--per_device_train_batch_size 3", "--world_size"),
    ],
)
def test_mistakes_end_with_code_2(words: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", *words.split()]) == 2
    assert part in capsys.readouterr().err


def test_a_deepspeed_file_decides_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    found = json.loads(cost(capsys, "--json", "--world-size", "4", "--deepspeed", str(path)))["scaling"]
    assert found["zero"]["stage"] == 1
    assert "moments" in found["memory"]["host"]
    assert cli.main(["cost", "--world-size", "4", "--deepspeed", str(path), "--zero-stage", "3"]) == 2
    assert "ZeRO-1" in capsys.readouterr().err
