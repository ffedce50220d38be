"""The estimated pace, `lvlm-clorae cost --world-size`, and the tables of docs/scaling.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lvlm_clorae import cli
from lvlm_clorae.analysis import scaling
from lvlm_clorae.analysis.scaling import CALL, FLOPS, HOP_INSIDE, HOP_OUTSIDE, INSIDE, SHIPPED, Plan, Zero
from lvlm_clorae.analysis.scaling_page import fill, plans, tables
from lvlm_clorae.analysis.traffic import Collective, Setting
from tests.analysis.sizes import small_model
from tests.launch import REPOSITORY

PAGE = REPOSITORY / "docs/scaling.md"
PLAN = Plan(small_model(), Setting(8, Zero(2)), micro_batch=2, patches=16)


def test_the_page_has_the_tables_that_are_counted() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == 4
    assert fill(page, tables(plans())) == page, f"run python -m {scaling.__name__}_page docs/scaling.md"


def test_the_assumptions_on_the_page_are_those_of_the_code() -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert pytest.approx(0.4 * 312e12) == FLOPS
    assert "40 % of an A100's 312 TFLOP/s" in page
    assert f"{scaling.TEXT} tokens of text" in page
    assert f"an answer of {scaling.ANSWER}" in page
    assert f"{INSIDE / 1e9:g} GB/s" in page
    assert f"{1e6 * CALL:g} µs for each call" in page
    assert f"{1e6 * HOP_INSIDE:g} µs for each further GPU" in page
    assert f"{1e6 * HOP_OUTSIDE:g} µs for each doubling" in page
    for name, speed in scaling.LINKS.items():
        assert name in page
        assert f"{speed / 1e9:g} GB/s" in page


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
def test_overlap_helps_and_one_rank_is_its_own_measure(stage: int, node: float) -> None:
    zero = Zero(stage, stage3_param_persistence_threshold=0)
    found = [
        scaling.pace(replace(PLAN, setting=replace(PLAN.setting, zero=zero, ranks=ranks)), node) for ranks in (1, 64)
    ]
    assert found[0].plain == found[0].overlapped == 1
    assert 0 < found[1].plain <= found[1].overlapped < 1
    assert found[1].exposed <= found[1].talking


def test_shipped_settings_are_those_of_the_files() -> None:
    for stage in (2, 3):
        content = json.loads((REPOSITORY / f"ds_configs/zero{stage}.json").read_text(encoding="utf-8"))
        assert Zero.read(content["zero_optimization"]) == Zero.read({"stage": stage, **SHIPPED})


def cost(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["cost", *words]) == 0
    return capsys.readouterr().out


def test_cost_on_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.loads(cost(capsys, "--json"))
    found = json.loads(cost(capsys, "--json", "--world-size", "8", "--zero-stage", "3", "--accumulation", "2"))
    counted = found.pop("scaling")
    assert found == plain
    assert (counted["ranks"], counted["zero"]["stage"], counted["accumulation"]) == (8, 3, 2)
    assert {one["purpose"] for one in counted["collectives"]} == {
        "losses", "gradients", "norm", "updated weights", "weights",
    }  # fmt: skip
    assert counted["sent"] == pytest.approx(sum(one["sent"] for one in counted["collectives"]))
    assert set(counted["pace"]) == set(scaling.LINKS)
    text = cost(capsys, "--world-size", "8")
    assert "demo with clorae, rank 16" in text
    assert "ZeRO-2" in text
    assert all(word in text for word in ("moments", "all_reduce", "25 GbE a node"))


def test_the_losses_of_a_method_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for name, words in {"clorae": [], "loramoe": [], "lora": [], "clorae, beta 0": ["--beta", "0"]}.items():
        line = ["--json", "--world-size", "2", "--adapter", name.split(",")[0], *words]
        (losses,) = (
            one for one in json.loads(cost(capsys, *line))["scaling"]["collectives"] if one["purpose"] == "losses"
        )
        sizes[name] = losses["payload"] // 4
    layers = 72  # of the demo base, all of whose linear layers are adapted
    assert sizes == {"clorae": layers + 6, "loramoe": 6 * layers + 6, "lora": 6, "clorae, beta 0": 6}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--zero-stage 2", "--world-size"),
        ("--deepspeed ds_configs/zero2.json", "--world-size"),
        ("--world-size 0", "at least 1"),
        ("--world-size 2 --zero-stage 0", "choose 1, 2 or 3"),
        ("--world-size 2 --accumulation 0", "accumulation = 0"),
        ("--world-size 2 --deepspeed none.json", "no such DeepSpeed file"),
        ("--world-size 2 --zero-stage 3 --load-in-8bit", "ZeRO-3"),
    ],
)
def test_mistakes(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_deepspeed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    found = json.loads(cost(capsys, "--json", "--world-size", "4", "--deepspeed", str(path)))["scaling"]
    assert found["zero"]["stage"] == 1
    assert "moments" in found["memory"]["host"]
    assert cli.main(["cost", "--world-size", "4", "--deepspeed", str(path), "--zero-stage", "3"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
