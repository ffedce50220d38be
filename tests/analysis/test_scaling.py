"""The estimated pace and ``lvlm-clorae cost --world-size``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lvlm_clorae import cli
from lvlm_clorae.analysis import scaling
from lvlm_clorae.analysis.scaling import CALL, HOP_INSIDE, HOP_OUTSIDE, INSIDE, SHIPPED, Plan
from lvlm_clorae.analysis.zero import Collective, Setting, Zero
from tests.helpers.launch import REPOSITORY
from tests.helpers.weights import small_model

PLAN = Plan(small_model(), Setting(8, Zero(2)), micro_batch=2, patches=16)


def test_operations_of_a_micro_step() -> None:
    joined = 16 + scaling.TEXT + scaling.ANSWER
    language = (4 * (3 * 1000 + 500) + 6 * 30) * joined
    assert scaling.flops(PLAN) == 2 * (language + 2 * 300 * 16)
    again = replace(PLAN, setting=replace(PLAN.setting, checkpointing=True))
    assert scaling.flops(again) - scaling.flops(PLAN) == 2 * 2 * (3 * 1010) * joined


def test_seconds_of_a_collective() -> None:
    one = Collective("", "all_reduce", 3, 10**9)
    inside = scaling.seconds(one, 8, node=1e9)
    assert inside == pytest.approx(3 * (CALL + 2 * 7 * HOP_INSIDE) + 2 * 7 / 8 * 1e9 / INSIDE)
    outside = scaling.seconds(one, 64, node=25e9)
    hops = 7 * HOP_INSIDE + 3 * HOP_OUTSIDE
    assert outside == pytest.approx(3 * (CALL + 2 * hops) + 2 * 63 / 64 * 1e9 / 25e9)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("node", [1e3, 1e9, 1e15])
def test_overlap_helps_and_one_rank_has_full_efficiency(stage: int, node: float) -> None:
    zero = Zero(stage, stage3_param_persistence_threshold=0)
    one, many = (
        scaling.pace(replace(PLAN, setting=replace(PLAN.setting, zero=zero, ranks=ranks)), node) for ranks in (1, 64)
    )
    assert one.plain == one.overlapped == 1
    assert 0 < many.plain <= many.overlapped < 1
    assert many.exposed <= many.talking


def test_shipped_settings_are_those_of_the_files() -> None:
    for stage in (2, 3):
        content = json.loads((REPOSITORY / f"ds_configs/zero{stage}.json").read_text(encoding="utf-8"))
        assert Zero.read(content["zero_optimization"]) == Zero.read({"stage": stage, **SHIPPED})


def cost(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["cost", *words]) == 0
    return capsys.readouterr().out


def test_cost_on_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.loads(cost(capsys, "--json"))
    found = json.loads(
        cost(capsys, "--json", "--world-size", "8", "--zero-stage", "3", "--gradient_accumulation_steps", "2")
    )
    counted = found.pop("scaling")
    assert found == plain
    assert (counted["ranks"], counted["zero"]["stage"], counted["accumulation"]) == (8, 3, 2)
    purposes = {"losses", "gradients", "norm", "updated weights", "weights"}
    assert {one["purpose"] for one in counted["collectives"]} == purposes
    assert counted["sent"] == pytest.approx(sum(one["sent"] for one in counted["collectives"]))
    assert set(counted["pace"]) == set(scaling.LINKS)
    text = cost(capsys, "--world-size", "8")
    assert all(word in text for word in ("demo with clorae, rank 16", "ZeRO-2", "moments", "all_reduce", "25 GbE"))


def test_the_auxiliary_loss_of_a_method_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for name, words in {"clorae": [], "loramoe": [], "lora": [], "clorae, beta 0": ["--beta", "0"]}.items():
        line = ["--json", "--world-size", "2", "--adapter", name.split(",")[0], *words]
        collectives = json.loads(cost(capsys, *line))["scaling"]["collectives"]
        sizes[name] = sum(one["payload"] for one in collectives if one["purpose"] == "losses") // 4
    layers = 72  # of the demo base, all of whose linear layers are adapted
    assert sizes == {"clorae": layers + 6, "loramoe": 6 * layers + 6, "lora": 6, "clorae, beta 0": 6}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--zero-stage 2", "--world_size"),
        ("--deepspeed ds_configs/zero2.json", "--world_size"),
        ("--world-size 0", "--world_size 0"),
        ("--world-size 2 --zero-stage 0", "--zero_stage 0"),
        ("--world-size 2 --gradient_accumulation_steps 0", "gradient_accumulation_steps"),
        ("--world-size 2 --deepspeed none.json", "none.json"),
        ("--world-size 2 --zero-stage 3 --load-in-8bit", "ZeRO-3"),
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
